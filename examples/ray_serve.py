"""Many adapters on more than one machine: Ray Serve's replicas, each with a store; a request goes where its adapter is.

    python examples/ray_serve.py --folder adapters

Ray's model multiplexing knows which replica has which adapters in memory and sends requests there; what a replica
batches is one forward, whichever adapters its rows have. Runs offline on a tiny random Llama, with adapters that it
makes where the folder has none. Needs ``pip install "fxpeft[ray]"``.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

import ray
import torch
from ray import serve
from transformers import LlamaConfig, LlamaForCausalLM

import fxpeft

TARGETS = ["q_proj", "v_proj", "down_proj"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HELD = 8  # adapters that a replica says it has


def base() -> LlamaForCausalLM:
    """The same weights in all replicas."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)).eval()


def make_adapters(folder: Path, count: int) -> None:
    """Adapters of several ranks."""
    for number in range(count):
        model = base()
        fxpeft.add_adapter(model, fxpeft.LoraConfig(r=2 + number % 3, lora_alpha=60, target_modules=TARGETS))
        torch.manual_seed(number)
        for tensor in fxpeft.adapter_state_dict(model).values():
            tensor.normal_(std=0.3)
        fxpeft.save_adapter(model, folder / f"user-{number}")


@serve.deployment
class Adapters:
    """One replica: the base, and those of the adapters that its requests named last."""

    def __init__(self, folder: str, lanes: int = 4) -> None:
        self.model = base()
        fxpeft.prepare_hotswap(self.model, max_rank=32, targets=TARGETS, lanes=lanes)
        self.store = fxpeft.AdapterStore(self.model, folder)

    @serve.multiplexed(max_num_models_per_replica=HELD)
    async def lease(self, name: str) -> object:
        """Loads an adapter beside what goes on; Ray keeps the lease, and lets go of the one used longest ago."""
        return await asyncio.to_thread(self.store.lease, name)

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.01)
    async def step(self, names: list[str], prompts: list[list[int]]) -> list[list[int]]:
        """One batch: each row with the adapter of its request."""
        return await asyncio.to_thread(self.generate, names, prompts)

    def generate(self, names: list[str], prompts: list[list[int]]) -> list[list[int]]:
        """Four tokens more for each prompt, which all have one length here."""
        ids = torch.tensor(prompts)
        with torch.no_grad(), self.store.rows(names):
            made = self.model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        return made[:, ids.shape[1] :].tolist()

    async def __call__(self, prompt: list[int]) -> tuple[list[int], int]:
        """The tokens that follow a prompt, with the adapter that the request names, and which replica made them."""
        name = serve.get_multiplexed_model_id()
        await self.lease(name)
        return await self.step(name, prompt), serve.get_replica_context().rank.rank


async def ask(handle: serve.handle.DeploymentHandle, names: list[str], times: int) -> list[tuple[str, list[int], int]]:
    """Ask with all names at once, so often: name, tokens, replica of each answer."""
    found = []
    for _ in range(times):
        calls = [handle.options(multiplexed_model_id=name).remote([5, 6, 7]) for name in names]
        answers = await asyncio.gather(*calls)
        found += [(name, *answer) for name, answer in zip(names, answers, strict=True)]
        await asyncio.sleep(1)  # replicas tell Ray ten times a second what they have
    return found


def main() -> None:
    """Two replicas here; on a cluster Ray spreads them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a sub-folder for each adapter")
    parser.add_argument("--replicas", type=int, default=2)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    if not any(folder.glob("*/adapter_config.json")):
        make_adapters(folder, 4)
    names = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    ray.init(log_to_driver=False)
    serve.start(proxy_location="Disabled")  # asked by its handle; with a proxy, by HTTP too
    app = Adapters.options(num_replicas=args.replicas, ray_actor_options={"num_cpus": 0.5}).bind(str(folder))
    answers = asyncio.run(ask(serve.run(app), names, 5))
    for name in names:
        own = [(tokens, replica) for asked, tokens, replica in answers if asked == name]
        print(f"{name}: {own[0][0]} by replica {', '.join(str(replica) for _, replica in own)}")
    serve.shutdown()


if __name__ == "__main__":
    main()
