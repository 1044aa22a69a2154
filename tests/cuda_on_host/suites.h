// The suites of main.cpp.
#pragma once

void gram_registers();
void gram_tensor_cores();
void gram_tables();  // many parameters and groups, mixed types
void gram_long();    // many terms per sum
void combine();
void grad_drop();
void trimmed_mean();
void min_norm();
void bounded_min_norm();
void dual_cone();
void frank_wolfe();
void simplex_lp();
void cagrad();
void krum();
void projected_gradient();
void random_weights();
void fairgrad();
void spectral();
void pcgrad();
void gradvac();
