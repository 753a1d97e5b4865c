"""sbn_tf: sparse (partial) Bayesian networks in Keras."""

__version__ = "0.1.0"
