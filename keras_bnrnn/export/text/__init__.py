"""Makes signatures that take text: `text` and, for language models, `generate`."""

from keras_bnrnn.export.text.front_end import TextFrontEnd
from keras_bnrnn.export.text.signatures import text_signatures

__all__ = ["TextFrontEnd", "text_signatures"]
