"""The rollout `hf`: one transformers model per worker in a Ray actor, for machines that vLLM does not run on.

verl imports this module in every process that reads its model configuration (`model.external_lib`); importing it
registers the rollout. The server samples with `rollout_decode`; the adapter lives in the training worker and brings it
the weights after every update.
"""

import asyncio
import os
import resource
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

from eaft_verl.training.grpo.config import stop_ids
from eaft_verl.training.grpo.rollout_decode import Decoder, Request, Sampling
from eaft_verl.training.grpo.states import server_name
from eaft_verl.training.stacks import write_stacks_when_asked
from eaft_verl.training.verl_cpu.private import register_adapter

NAME = "hf"
BURST_S = 0.25  # requests arrive one by one; when none has come for so long, those that have are a batch
# a request that comes later is rounded otherwise than in their midst: a shorter time is met on a busy machine
KNOWN_PARAMETERS = frozenset(
    (
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "logprobs",
        "max_tokens",
        "seed",
        "ignore_eos",
        "stop_token_ids",
    )
)


def request_of(prompt: Sequence[int], parameters: dict[str, Any], longest: int, ignore_eos: bool) -> Request:
    """verl's prompt and sampling parameters as ours; ValueError for one that this server would have to ignore."""
    if unknown := sorted(parameters.keys() - KNOWN_PARAMETERS):
        raise ValueError(f"the hf rollout does not know the sampling parameter {unknown[0]!r}")
    if parameters.get("repetition_penalty", 1.0) != 1.0:
        raise ValueError("the hf rollout knows no repetition_penalty; leave it at 1.0")
    if "seed" not in parameters:
        raise ValueError("the hf rollout needs a seed per request; use the agent loop eaft_single_turn")
    sampling = Sampling(
        max_tokens=min(longest, parameters.get("max_tokens", longest)),
        temperature=float(parameters.get("temperature", 1.0)),
        top_k=int(parameters.get("top_k", -1)),
        top_p=float(parameters.get("top_p", 1.0)),
        ignore_eos=parameters.get("ignore_eos", ignore_eos),
        stop_ids=frozenset(parameters.get("stop_token_ids") or ()),
    )
    return Request(tuple(map(int, prompt)), sampling, parameters["seed"])


class HfServer:
    """An async Ray actor: requests in, TokenOutputs out; weights are replaced between two batches, never within one.

    After an exception in the model every request, old or new, fails with it: a broken server is not used further.
    """

    def __init__(self, path: str, dtype: str, response_length: int, ignore_eos: bool, rows: int, tokens: int) -> None:
        write_stacks_when_asked()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        self.model = model.eval().requires_grad_(False)
        self.decoder, self.rows = Decoder(self.model, stop_ids(path), tokens), rows
        self.response_length, self.ignore_eos = response_length, ignore_eos
        self.missing = self._all_weights()
        self.steps: int | None = None
        self.rejecting = False
        self.failure: BaseException | None = None
        self._turn = asyncio.Lock()
        self._open = asyncio.Event()
        self._open.set()
        self._waiting: dict[Request, asyncio.Future[None]] = {}
        self._loop: asyncio.Task[None] | None = None

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
        **_: Any,
    ) -> TokenOutput:
        """Sample one response; held back while generation is aborted, unless requests are to be refused."""
        if image_data or video_data:
            raise ValueError("the hf rollout generates from text only")
        request = request_of(prompt_ids, sampling_params, self.response_length, self.ignore_eos)
        if self.rejecting:
            raise RuntimeError("the rollout server takes no requests: it is being removed")
        await self._open.wait()
        if self.failure:
            raise self.failure
        self._waiting[request] = asyncio.get_running_loop().create_future()
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        await self._waiting[request]
        return TokenOutput(
            token_ids=request.tokens,
            log_probs=request.log_probs,
            stop_reason="aborted" if request.finish == "aborted" else "completed",
            extra_fields={"global_steps": self.steps, "finish_reason": request.finish},
        )

    async def _run(self) -> None:
        """Decode in a thread until nobody waits, so that the actor answers meanwhile."""
        while self._waiting:
            count = 0
            while count < (count := len(self._waiting)):
                await asyncio.sleep(BURST_S)
            sampling = next(iter(self._waiting)).sampling
            alike = [request for request in self._waiting if request.sampling == sampling]
            batch = sorted(alike, key=lambda request: (request.prompt, request.seed))[: self.rows]  # not as they came
            async with self._turn:
                try:
                    await asyncio.to_thread(self.decoder.run, batch)
                except Exception as error:
                    self.failure = error
                    for future in self._waiting.values():
                        future.set_exception(error)
                    self._waiting.clear()
                    return
            for request in batch:
                self._waiting.pop(request).set_result(None)

    async def update_weights(self, weights: dict[str, np.ndarray], last: bool, steps: int | None) -> None:
        """Take over some of the weights (bytes of the server's dtype); after the last part all must have come."""
        async with self._turn:
            await asyncio.to_thread(self._load, weights)
            if last:
                if self.missing:
                    raise RuntimeError(f"the weight sync left out {len(self.missing)} weights: {min(self.missing)}")
                self.missing, self.steps = self._all_weights(), steps

    def _all_weights(self) -> set[str]:
        """Names of the weights a sync must bring; a tied head is the embedding."""
        return {name for name, _weight in self.model.named_parameters()}

    def _load(self, weights: dict[str, np.ndarray]) -> None:
        state = self.model.state_dict()
        for name, raw in weights.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the array is shared memory and read-only, and is only read
                tensor = torch.from_numpy(raw).view(state[name].dtype)
            state[name].copy_(tensor.view_as(state[name]))
            self.missing.discard(name)

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """End all requests where they are; later ones wait for `resume_generation`, or fail with `reject_request`."""
        self._open.clear()
        self.rejecting = reject_request
        ended = [request for request in self._waiting if not request.finish]
        for request in ended:
            request.finish = "aborted"
        if self._loop is not None:
            await asyncio.wait([self._loop])
        return {"aborted_count": len(ended)}

    async def resume_generation(self) -> None:
        """Take requests again."""
        self.rejecting = False
        self._open.set()

    async def sleep(self, *_: Any, **__: Any) -> None:
        """Nothing to give back or to fetch: the weights stay, and no keys or values are kept after a batch."""

    wake_up = clear_kv_cache = release_kv_cache = resume_kv_cache = sleep

    async def set_global_steps(self, steps: int) -> None:
        """Version of the weights, which every response carries."""
        self.steps = steps

    async def peak_memory(self) -> float:
        """Peak resident GiB of this process."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class HfReplica(RolloutReplica):
    """One server beside one training worker, on its node."""

    async def launch_servers(self) -> None:
        """Start the server; it answers once the model is loaded."""
        node = await self.workers[0].__ray_call__.remote(lambda worker: ray.get_runtime_context().get_node_id())
        affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        server: Any = ray.remote(HfServer).options(
            name=server_name(self.replica_rank), max_concurrency=self.max_concurrency, scheduling_strategy=affinity
        )
        self._server_handle = server.remote(
            path=self.model_config.path,
            dtype=self.config.dtype,
            response_length=self.config.response_length,
            ignore_eos=self.config.ignore_eos,
            rows=self.config.max_num_seqs,
            tokens=self.config.max_num_batched_tokens,
        )
        self.servers = [self._server_handle]
        self._server_address = server_name(self.replica_rank)
        await self._server_handle.wake_up.remote()


class HfAdapter(BaseRollout):
    """The training worker's side: hands its weights to its server."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        self.rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank
        self.dtype = getattr(torch, self.config.dtype)

    async def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], wire_format: str = "named_tensors", **kwargs: Any
    ) -> None:
        """Send all weights, in parts of `checkpoint_engine.update_weights_bucket_megabytes`; every rank its own."""
        if wire_format != "named_tensors" or kwargs.get("peft_config"):
            raise RuntimeError("the hf rollout takes whole weights; an adapter must be merged first")
        steps = kwargs.get("global_steps")
        server = ray.get_actor(server_name(self.rank))
        limit = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        tied = self.model_config.hf_config.tie_word_embeddings
        bucket: dict[str, np.ndarray] = {}
        for name, weight in weights:
            if tied and name == "lm_head.weight":
                continue
            full = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            raw = full.detach().to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8).numpy()
            if bucket and sum(part.nbytes for part in bucket.values()) + raw.nbytes > limit:
                await server.update_weights.remote(bucket, last=False, steps=steps)
                bucket = {}
            bucket[name] = raw
        await server.update_weights.remote(bucket, last=True, steps=steps)

    async def resume(self, tags: list[str] | None = None) -> None:
        """Nothing: the server keeps everything in memory."""

    release = resume


RolloutReplicaRegistry.register(NAME, lambda: HfReplica)
register_adapter(NAME, f"{__name__}.HfAdapter")
