"""verl's single-turn agent loop with a seed per response, and the cause kept when a response cannot be made."""

import hashlib
import json
from pathlib import Path
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from eaft_verl.files import write_text
from eaft_verl.training.grpo.states import CAUSE_FILE
from eaft_verl.training.stacks import write_stacks_when_asked

write_stacks_when_asked()  # every process that reads the model's configuration imports this module

NAME = "eaft_single_turn"


def response_seed(seed: int, step: int, messages: list[dict[str, Any]], sample: int) -> int:
    """Seed of one response, 63 bits: of the run's seed, the step, the prompt and its number within the group."""
    text = json.dumps([seed, step, messages, sample], sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@register(NAME)
class SeededSingleTurn(SingleTurnAgentLoop):
    """One prompt, one response, which also ends where the prepared turns do.

    The seed makes a run repeatable however its requests are batched and routed.
    """

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """Generate; an exception is written beside the run before it goes on, because verl only counts it."""
        ours, messages = self.config.trainer.eaft, list(kwargs["raw_prompt"])
        stops = {"stop_token_ids": list(ours.stop_ids)} if ours.stop_ids else {}
        seed = response_seed(ours.seed, int(kwargs["global_steps"]), messages, int(kwargs["session_id"]))
        try:
            return await super().run({**sampling_params, **stops, "seed": seed}, priority, **kwargs)
        except Exception as error:
            write_text(Path(ours.run) / CAUSE_FILE, f"{type(error).__name__}: {error}\n")
            raise
