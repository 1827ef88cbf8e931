"""What a model is: one frozen value that the modules read, and that a config file may override key by key."""

import dataclasses

from easylm_plus.errors import UserError

ROPE_SCALINGS = ("none", "linear", "ntk", "llama3")
# Localized filtering (models/lfa.py): the taps of each convolution.
LFA_TAPS: dict[str, tuple[int, ...]] = {
    "none": (),
    "conv1": (1,),
    "conv2": (2,),
    "conv3": (3,),
    "conv7": (7,),
    "two_convs": (2, 2),
    "yuan": (2, 2),
}
ATTENTIONS = ("auto", "xla", "blocked", "cudnn", "splash")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture first, then how it is run (which changes speed and memory, never the numbers)."""

    # --- architecture ---
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # = num_heads: MHA; 1: MQA; between: GQA (arXiv:2305.13245)
    head_dim: int  # free: need not be hidden_size / num_heads
    max_length: int = 2048  # positions the model was made for
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    lfa_variant: str = "none"  # filter of queries and keys, a name in LFA_TAPS; Yuan 2.0 has "yuan"
    lfa_reset: bool = False  # the filter does not look into the document before
    sliding_window: int = 0  # a query sees this many last positions, itself included; 0: all
    rope_theta: float = 10000.0
    rope_scaling: str = "none"  # none | linear | ntk | llama3
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0  # llama3 only, as are the next two
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    init: str = "llama"  # a row of models/initializers.py
    # --- how it is run ---
    attention: str = "auto"  # auto | xla | blocked | cudnn | splash
    scan_layers: bool = True  # one compiled layer instead of num_layers; weights are stacked
    remat: str = "none"  # a name in models/transformer.py's REMAT

    def __post_init__(self) -> None:
        """Refuses values that no model has; the message names the key as a config file writes it."""
        positive = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
        )
        for key in (*positive, "head_dim", "max_length"):
            if getattr(self, key) < 1:
                raise UserError(f"model.{key} = {getattr(self, key)}: expected a positive number")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_kv_heads = {self.num_kv_heads}: expected a divisor of num_heads = {self.num_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim = {self.head_dim}: rotary positions turn pairs, so it must be even")
        for key, known in (("rope_scaling", ROPE_SCALINGS), ("attention", ATTENTIONS), ("lfa_variant", LFA_TAPS)):
            if getattr(self, key) not in known:
                raise UserError(f"model.{key} = {getattr(self, key)!r}: expected one of {', '.join(known)}")

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def lfa_reach(self) -> int:
        """Tokens before the present one that the filter sees."""
        return sum(taps - 1 for taps in LFA_TAPS[self.lfa_variant])


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that a token is multiplied by: all matrices, the head included, the embedding table not."""
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    feedforward = 3 * config.hidden_size * config.intermediate_size
    taps = LFA_TAPS[config.lfa_variant]
    lfa = sum(taps) * config.hidden_size**2 // len(taps) if taps else 0  # a pair of convolutions has half the width
    return config.num_layers * (attention + feedforward + lfa) + config.hidden_size * config.vocab_size


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """6 N + 6 L T H K: forward and backward FLOPs of one token in a causal sequence of `length` tokens.

    N are the matmul parameters; attention is counted causally (half of the full square). Recomputation under
    remat does not count: this is the numerator of MFU (PaLM, arXiv:2204.02311, appendix B), not of HFU.
    """
    attention = 6 * config.num_layers * length * config.num_heads * config.head_dim
    return 6 * matmul_parameters(config) + attention
