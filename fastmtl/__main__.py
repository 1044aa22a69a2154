"""``python -m fastmtl info|methods|doctor|demo``."""

from __future__ import annotations

import os
import platform
import sys

USAGE = """usage: python -m fastmtl COMMAND

  info     versions, and the state of the compiled extension
  methods  every method: what it answers, needs, keeps and costs (--markdown)
  doctor   LOG  read a log of fastmtl.Monitor (.jsonl, .csv): which trouble, and what answers it (--plot FILE)
  demo     train 25 tasks on customer reviews, or 150 on groceries, with every method (--help for options)
"""


def info() -> int:
    """Print versions, the state of the compiled extension, and what to do."""
    import torch

    import fastmtl
    from fastmtl import _extension

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU-only build"
    lines = [
        ("fastmtl", fastmtl.__version__),
        ("python", f"{platform.python_version()} on {platform.machine()} {platform.system()}"),
        (
            "torch",
            f"{torch.__version__}, {cuda}, {torch.get_num_threads()} threads",
        ),
    ]
    if _extension.module is None:
        lines += [("extension", f"missing: {_extension.missing_because}"), ("to do", _extension.CURE)]
    else:
        build = _extension.module.build_info()
        lines += [
            ("extension", f"loaded, built with {build['compiler']} for torch >= 2.10"),
            ("CPU kernels", f"{build['cpu_capability']}"),
            ("CUDA kernels", f"for {build['cuda_archs']}" if build["cuda"] else "not built"),
        ]
        if not build["cuda"] and torch.version.cuda:
            lines.append(
                ("to do", "this torch has CUDA: reinstall fastmtl where nvcc is found (CUDA_HOME, FASTMTL_CUDA=1)")
            )
    if torch.cuda.is_available():
        lines += [(f"GPU {i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    for name, value in lines:
        print(f"{name:<13} {value}")
    return 0


def doctor(argv: list[str]) -> int:
    """Print what a log of `fastmtl.Monitor` says; returns the exit status."""
    import argparse

    from fastmtl import diagnosis

    parser = argparse.ArgumentParser(prog="python -m fastmtl doctor", description=doctor.__doc__)
    parser.add_argument("log", help="a .jsonl or .csv file that fastmtl.Monitor has written")
    parser.add_argument("--plot", metavar="FILE", help="also draw it (.png, .pdf, .svg)")
    arguments = parser.parse_args(argv)
    try:
        records, names = diagnosis.read(arguments.log)
        print(diagnosis.report(records, names))
    except (OSError, ValueError) as error:
        print(f"python -m fastmtl doctor: {error}", file=sys.stderr)
        return 1
    if arguments.plot:
        diagnosis.plot(records, names).savefig(arguments.plot, dpi=110)
    return 0


def main(argv: list[str]) -> int:
    """Run a command; returns the exit status."""
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command == "info":
        return info()
    if command == "methods":
        from fastmtl import methods

        if rest not in ([], ["--markdown"]):
            print(f"python -m fastmtl methods: unknown option {rest[0]!r}", file=sys.stderr)
            return 2
        print(methods.markdown() if rest else methods.text())
        return 0
    if command == "doctor":
        return doctor(rest)
    if command == "demo":
        from fastmtl import demo

        return demo.main(rest)
    print(USAGE, end="", file=sys.stdout if command in ("-h", "--help") else sys.stderr)
    if command not in ("-h", "--help"):
        print(f"python -m fastmtl: unknown command {command!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
