"""Krylov solvers and stochastic estimators on curvature operators, many samples in lock-step."""
