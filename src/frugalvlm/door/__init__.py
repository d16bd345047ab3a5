"""The front door: methods, models and data of anybody's, compared by one call."""

from frugalvlm.door.comparing import compare, evaluate
from frugalvlm.door.request import RequestError
from frugalvlm.door.result import ComparisonResult

__all__ = ["ComparisonResult", "RequestError", "compare", "evaluate"]
