from keras_bnrnn.export.saved_model import VersionExistsError, export_saved_model

__all__ = ["VersionExistsError", "export_saved_model"]
