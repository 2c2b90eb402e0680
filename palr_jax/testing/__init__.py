"""Made-up data, tiny models and tokenizers: everything can be tested without downloads.

They are shipped, so that users can test their own code with them.
"""

from palr_jax.testing.amazon import write_amazon
from palr_jax.testing.movielens import write_ml1m, write_ml100k, write_recbole

__all__ = ['write_amazon', 'write_ml1m', 'write_ml100k', 'write_recbole']
