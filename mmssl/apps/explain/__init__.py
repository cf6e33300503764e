"""Explanations of the similarity of an image and a caption: maps over the image, scores of words, training pairs."""

from mmssl.apps.explain import occlusion
from mmssl.apps.explain.explanation import Explanation, Neighbour, explain, nearest, word_scores
from mmssl.apps.explain.maps import DEFAULT, METHODS, image_maps, methods_of, overlay
from mmssl.apps.explain.plots import draw_explanation

__all__ = [
    "DEFAULT",
    "METHODS",
    "Explanation",
    "Neighbour",
    "draw_explanation",
    "explain",
    "image_maps",
    "methods_of",
    "nearest",
    "occlusion",
    "overlay",
    "word_scores",
]
