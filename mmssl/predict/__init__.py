"""What pictures show: the probabilities of labels, and a drawing of them."""

from mmssl.predict.labels import Prediction, files_of, predict, zero_shot

__all__ = ["Prediction", "files_of", "predict", "zero_shot"]
