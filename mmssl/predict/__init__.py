"""What pictures show: the probabilities of labels, and a drawing of them."""

from mmssl.predict.labels import Classify, Prediction, files_of, predict, zero_shot

__all__ = ["Classify", "Prediction", "files_of", "predict", "zero_shot"]
