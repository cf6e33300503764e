"""What images show: the probabilities of labels, and a drawing of them."""

from mmssl.inference.classify import Classify, Prediction, list_images, predict, zero_shot

__all__ = ["Classify", "Prediction", "list_images", "predict", "zero_shot"]
