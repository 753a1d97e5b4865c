"""sbn_tf: sparse (partial) Bayesian networks in Keras.

Importing it registers its layers, models, losses and optimisers with Keras: `.keras` files load without
`custom_objects`.
"""

from sbn_tf.core.quiet import quiet_tensorflow

quiet_tensorflow()  # before anything imports Keras

from sbn_tf import layers, partial_bayes, saliency  # noqa: E402
from sbn_tf.experiments import recipes  # noqa: E402

__all__ = ["layers", "partial_bayes", "recipes", "saliency"]
__version__ = "0.1.0"
