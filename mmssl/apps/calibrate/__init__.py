"""Calibration: probabilities and thresholds of a model, fitted on held-out pairs and measured on others."""

from mmssl.apps.calibrate.fit import calibrate, fit
from mmssl.apps.calibrate.measure import measure
from mmssl.apps.calibrate.trials import Trials, trials_of

__all__ = ["Trials", "calibrate", "fit", "measure", "trials_of"]
