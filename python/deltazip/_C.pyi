"""The compiled engine. Token ids and numbers cross this border; text and pointers do not.

Every method may be called from any thread; those that wait release the GIL.
"""

from collections.abc import Sequence
from typing import ClassVar

__version__: str

class InvalidArgument(ValueError): ...
class NotFound(KeyError): ...
class ResourceExhausted(RuntimeError): ...
class InternalError(RuntimeError): ...

class EngineConfig:
    """See include/deltazip/engine/engine.h; 0 and "auto" mean: chosen by the engine."""

    base: str
    device: str
    num_threads: int
    kv_dtype: str
    kv_cache_bytes: int
    memory_budget_bytes: int
    delta_budget_bytes: int
    host_budget_bytes: int
    num_delta_slots: int
    block_size: int
    max_batch_tokens: int
    max_batch_sequences: int
    max_variants_per_batch: int
    max_waiting: int
    max_model_len: int
    max_variant_wait_steps: int
    prefix_caching: bool
    def __init__(self, **kwargs: object) -> None: ...

class SamplingParams:
    n: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    logit_bias: dict[int, float]
    stop_token_ids: list[int]
    ignore_eos: bool
    min_tokens: int
    max_tokens: int
    logprobs: int
    prompt_logprobs: int
    def __init__(self, **kwargs: object) -> None: ...

class Finish:
    NONE: ClassVar[Finish]
    STOP: ClassVar[Finish]
    LENGTH: ClassVar[Finish]
    CANCELLED: ClassVar[Finish]
    ERROR: ClassVar[Finish]
    @property
    def name(self) -> str: ...

class TokenLogprobs:
    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]

class OutputEvent:
    request_id: int
    choice: int
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs | None]
    finish: Finish
    stop_token: int
    error: str
    num_cached_prompt_tokens: int

class VariantInfo:
    name: str
    path: str
    parent: str
    content_digest: str
    state: str
    file_bytes: int
    device_bytes: int
    num_requests: int
    num_running: int
    num_waiting: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_loads: int
    num_evictions: int
    load_seconds: float
    manifest_json: str

class CapacityRow:
    what: str
    bytes: int
    detail: str

class EngineStats:
    num_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_requests: int
    num_finished: int
    num_cancelled: int
    num_errors: int
    seconds_since_progress: float
    last_step_seconds: float
    is_alive: bool
    failure: str
    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int

class Engine:
    def __init__(self, config: EngineConfig) -> None: ...
    def add_variant(self, name: str, path: str) -> VariantInfo: ...
    def remove_variant(self, name: str) -> None: ...
    def is_draining(self, name: str) -> bool: ...
    def variants(self) -> list[VariantInfo]: ...
    def submit(
        self,
        request_id: int,
        variant: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None: ...
    def cancel(self, request_id: int) -> None: ...
    def poll(self, max_events: int = 256, timeout_ms: int = 100) -> list[OutputEvent]: ...
    def stats(self) -> EngineStats: ...
    def capacity(self) -> list[CapacityRow]: ...
    def config(self) -> EngineConfig: ...
    def base_digest(self) -> str: ...
    def model_config_json(self) -> str: ...
    def vocab_size(self) -> int: ...
    def device_description(self) -> str: ...
    def check(self) -> None: ...
    def shutdown(self) -> None: ...
