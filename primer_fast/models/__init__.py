"""Models as modules, writing text with them, and weights of other programs. Each has a file of its own."""

from typing import TYPE_CHECKING

from primer_fast.lazy import lazy

__all__ = [
    "CNN",
    "MLP",
    "ActorCritic",
    "CNNConfig",
    "KVCache",
    "MLPConfig",
    "RewardModel",
    "Sampling",
    "Transformer",
    "TransformerConfig",
    "ViT",
    "ViTConfig",
    "actor_critic",
    "cnn",
    "generate",
    "generation",
    "kv_cache",
    "load_bert",
    "load_gpt2",
    "mlp",
    "pretrained",
    "reward",
    "transformer",
    "vit",
]

if TYPE_CHECKING:
    from primer_fast.models import actor_critic, cnn, generation, kv_cache, mlp, pretrained, reward, transformer, vit
    from primer_fast.models.actor_critic import ActorCritic
    from primer_fast.models.cnn import CNN, CNNConfig
    from primer_fast.models.generation import Sampling, generate
    from primer_fast.models.kv_cache import KVCache
    from primer_fast.models.mlp import MLP, MLPConfig
    from primer_fast.models.pretrained import load_bert, load_gpt2
    from primer_fast.models.reward import RewardModel
    from primer_fast.models.transformer import Transformer, TransformerConfig
    from primer_fast.models.vit import ViT, ViTConfig
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "actor_critic": ["ActorCritic"],
            "cnn": ["CNN", "CNNConfig"],
            "generation": ["Sampling", "generate"],
            "kv_cache": ["KVCache"],
            "mlp": ["MLP", "MLPConfig"],
            "pretrained": ["load_bert", "load_gpt2"],
            "reward": ["RewardModel"],
            "transformer": ["Transformer", "TransformerConfig"],
            "vit": ["ViT", "ViTConfig"],
        },
    )
