"""A role of your own: the projections into the latent space of a multi-head latent attention.

Roles are patterns over the data flow, so that this one finds DeepSeek's ``q_a_proj`` and
``kv_a_proj_with_mqa`` without their names: linears that feed another one, with no activation between,
which an attention reads. Run: python examples/own_role.py
"""

from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import fxpeft
from fxpeft.passes import Role, declare

declare(Role("down:linear -{!activation}-> up:linear -> a:attention", {"down": "attention.latent"}))


def main() -> None:
    """Adapt them, and print their names."""
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=4,
            v_head_dim=6, first_k_dense_replace=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    fxpeft.add_adapter(model, fxpeft.LoraConfig(r=4, target_modules="role:attention.latent"))
    print("\n".join(sorted(fxpeft.adapter_config(model).target_modules)))


if __name__ == "__main__":
    main()
