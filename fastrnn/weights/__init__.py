"""Weights of other runtimes, in and out: Keras 3 (``keras.py``) and ONNX (``onnx.py``). Neither is imported for it."""

from .keras import from_keras, load_keras, to_keras
from .onnx import OnnxLayer, Reversed, from_onnx, to_onnx

__all__ = ["OnnxLayer", "Reversed", "from_keras", "from_onnx", "load_keras", "to_keras", "to_onnx"]
