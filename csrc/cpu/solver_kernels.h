// The solvers of one problem. Included by each_target.h once per instruction set, after vector.h: `flatten` draws all
// that a solver calls into the function, and so under its instruction set.

#define FASTMTL_SOLVER static __attribute__((flatten))

FASTMTL_SOLVER double min_norm(const Problem& problem, double* scratch, double* weights) {
  return min_norm_problem(HostTeam(), problem, scratch, weights);
}

FASTMTL_SOLVER double bounded_min_norm(const Problem& problem, const double* bounds, double* scratch, double* weights) {
  return bounded_min_norm_problem(HostTeam(), problem, bounds, scratch, weights);
}

FASTMTL_SOLVER double frank_wolfe(const Problem& problem, const FrankWolfe& method, double* scratch, double* weights) {
  return frank_wolfe_problem(HostTeam(), problem, method, scratch, weights);
}

FASTMTL_SOLVER double dual_cone(const Problem& problem, const double* combination, double noise, double* scratch,
                                double* weights) {
  return dual_cone_problem(HostTeam(), problem, combination, noise, scratch, weights);
}

FASTMTL_SOLVER double simplex_lp(const Problem& problem, const SimplexLp& method, double* scratch, double* weights) {
  return simplex_lp_problem(HostTeam(), problem, method, scratch, weights);
}

FASTMTL_SOLVER void one_pcgrad_row(const Problem& problem, const PCGrad& method, int row, double* scratch,
                                   double* coefficients) {
  pcgrad_row(HostTeam(), problem, method.order, method.include_self, row, scratch, coefficients);
}

FASTMTL_SOLVER void one_gradvac_row(const Problem& problem, const GradVac& method, int row, const double* targets,
                                    double* new_targets, double* scratch, double* coefficients) {
  const GradVacRule rule = {method.beta, method.ema_first, method.ema_always};
  gradvac_row(HostTeam(), problem, method.order, rule, row, targets, new_targets, scratch, coefficients);
}

FASTMTL_SOLVER double fairgrad(const Problem& problem, const FairGrad& method, double* scratch, double* weights) {
  return fairgrad_problem(HostTeam(), problem, method, scratch, weights);
}

FASTMTL_SOLVER void spectral(const Problem& problem, const Spectral& method, double* scratch, double* weights) {
  spectral_problem(HostTeam(), problem, method, scratch, weights);
}

FASTMTL_SOLVER double cagrad(const Problem& problem, double c, double* scratch, double* weights) {
  return cagrad_problem(HostTeam(), problem, c, scratch, weights);
}

FASTMTL_SOLVER void krum(const Problem& problem, const Krum& method, double* scratch, double* weights) {
  krum_problem(HostTeam(), problem, method, scratch, weights);
}

FASTMTL_SOLVER void projected_gradient(const Problem& problem, const ProjectedGradient& method, double* scratch,
                                       double* weights) {
  projected_gradient_problem(HostTeam(), problem, method, scratch, weights);
}

constexpr SolverKernels kSolverKernels = {min_norm,       bounded_min_norm,  frank_wolfe, dual_cone, simplex_lp,
                                          one_pcgrad_row, one_gradvac_row,   fairgrad,    cagrad,    spectral,
                                          krum,           projected_gradient};

#undef FASTMTL_SOLVER
