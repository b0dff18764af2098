"""Metrics under the names of reference endpoint pickers."""

from dp_extproc.config import parse_config
from dp_extproc.observability.pool_metrics import gateway_names

POOLS = """
protocol: endpoint_picker
pools:
- models: [a]
  prefill: {kubernetes: {inference_pool: qwen-prefill}}
  decode: {kubernetes: {inference_pool: qwen}}
- models: [b]
  workers: {kubernetes: [{service: x}, {inference_pool: llama}]}
- models: [c]
  prefill: {kubernetes: {inference_pool: phi}}
  decode: {kubernetes: {service: phi}}
"""


def test_a_pool_has_the_name_of_the_inference_pool_that_the_gateway_reaches() -> None:
    """Autoscalers read the metrics by that name. A gateway sends no request to a prefill endpoint."""
    assert gateway_names(parse_config(POOLS).pools) == {"a": "qwen", "b": "llama", "c": "c"}
