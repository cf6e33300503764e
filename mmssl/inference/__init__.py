"""What pictures show: the probabilities of labels, and a drawing of them."""

from mmssl.inference.classify import Classify, Prediction, files_of, predict, zero_shot

__all__ = ["Classify", "Prediction", "files_of", "predict", "zero_shot"]
