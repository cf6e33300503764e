"""Classifiers that are trained on labelled images: logistic regression on features, and fine-tuning of the tower."""

from mmssl.evaluate.classifiers import fine_tuning, logistic_regression

__all__ = ["fine_tuning", "logistic_regression"]
