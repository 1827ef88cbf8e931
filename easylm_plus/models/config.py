"""What a model is: one frozen value that the modules read, and that a config file may override key by key."""

import dataclasses

from easylm_plus.errors import UserError

ROPE_SCALINGS = ("none", "linear", "ntk", "llama3")
# Localized filtering (models/lfa.py): the taps of each convolution; ema is a moving average (models/ema.py).
LFA_TAPS: dict[str, tuple[int, ...]] = {
    "none": (),
    "conv1": (1,),
    "conv2": (2,),
    "conv3": (3,),
    "conv7": (7,),
    "two_convs": (2, 2),
    "yuan": (2, 2),
    "ema": (),
}
EMA_SIZE = 16  # averages a channel
ATTENTIONS = ("auto", "xla", "blocked", "cudnn", "splash")
CHOICES = {  # keys that take one of a few names
    "norm": ("rms", "layer", "layer_no_bias"),
    "activation": ("silu", "relu", "relu2", "gelu", "gelu_tanh"),
    "positions": ("rotary", "learned"),
    "rope_scaling": ROPE_SCALINGS,
    "rope_dtype": ("float32", "bfloat16"),
    "lfa_variant": tuple(LFA_TAPS),
    "router": ("softmax", "attention"),
    "attention": ATTENTIONS,
    "grouped": ("auto", "ragged", "tiled"),
    "gather": ("compute", "e4m3"),
    "kv_cache": ("compute", "int8"),
}


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
    norm: str = "rms"  # rms | layer | layer_no_bias (PaLM)
    parallel_block: bool = False  # attention and feed-forward side by side on one norm (PaLM)
    sub_norms: bool = False  # a norm before the last matrix of attention and of the feed-forward (BitNet)
    causal: bool = True  # a query sees no later key; False: all of its document (for masked-token training)
    # --- feed-forward ---
    activation: str = "silu"  # silu | relu | relu2 | gelu | gelu_tanh (GPT-2)
    gated: bool = True  # down(act(gate(x)) * up(x)); False: down(act(up(x)))
    mlp_bias: bool = False
    num_experts: int = 0  # 0: dense
    experts_per_token: int = 2
    router: str = "softmax"  # softmax | attention (Yuan 2.0-M32)
    norm_topk: bool = True  # the chosen experts' weights are made to add up to 1; False: Switch
    capacity_factor: float = 0.0  # room of an expert, in shares of an even load; what is over it is dropped; 0: all fit
    # --- attention ---
    qkv_bias: bool = False  # Qwen2
    o_bias: bool = False
    share_qk: bool = False  # queries and keys are one projection, each scaled and shifted (a variant of Yuan 2.0)
    lfa_variant: str = "none"  # filter of queries and keys, a name in LFA_TAPS; Yuan 2.0 has "yuan"
    lfa_norm: bool = False  # RMSNorm of the filter's output; "yuan" has it anyway
    lfa_reset: bool = False  # the filter does not look into the document before
    sliding_window: int = 0  # a query sees this many last positions, itself included; 0: all
    # --- positions ---
    positions: str = "rotary"  # rotary | learned (a table of max_length)
    rotary_share: float = 1.0  # of a head's features that turn, the first ones
    rope_theta: float = 10000.0
    rope_scaling: str = "none"  # none | linear | ntk | llama3
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0  # llama3 only, as are the next two
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    rope_dtype: str = "float32"  # of frequencies and angles; Yuan 2.0's released code has bfloat16
    # --- ends ---
    logit_scale: float = 1.0  # what the head's output is multiplied by; PaLM: hidden_size ** -0.5
    init: str = "llama"  # a row of models/initializers.py
    # --- how it is run ---
    attention: str = "auto"  # auto | xla | blocked | cudnn | splash
    grouped: str = "auto"  # how experts multiply: auto | ragged | tiled
    gather: str = "compute"  # what travels where tensor cuts the length: compute | e4m3 (numerics/sequence.py)
    scan_layers: bool = True  # one compiled layer instead of num_layers; weights are stacked
    kv_cache: str = "compute"  # what decoding keeps keys and values as: compute | int8, which rounds (kv_cache.py)
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
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise UserError(
                f"model.head_dim = {self.head_dim}, rotary_share = {self.rotary_share}: rotary positions turn pairs of "
                f"features, so their product must be even; found {self.rotary_dim}"
            )
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise UserError(f"model.{key} = {getattr(self, key)!r}: expected one of {', '.join(known)}")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise UserError(
                f"model.experts_per_token = {self.experts_per_token}: expected 1 to num_experts = {self.num_experts}"
            )
        if self.share_qk and (self.lfa_variant != "none" or self.num_kv_heads != self.num_heads):
            raise UserError("model.share_qk: expected lfa_variant none and as many key as query heads")
        if self.lfa_norm and self.lfa_variant == "none":
            raise UserError("model.lfa_norm = True: expected False where lfa_variant = 'none': there is no filter")
        if self.lfa_reset and self.lfa_variant == "ema":
            raise UserError(
                "model.lfa_reset = True: expected False with lfa_variant = 'ema', whose average runs through the row"
            )
        if not self.causal and self.sliding_window:
            raise UserError("model.sliding_window: looks back only; expected causal True or sliding_window 0")
        if not self.causal and self.lfa_variant != "none":
            raise UserError(
                f"model.causal = False: expected lfa_variant none, found {self.lfa_variant!r}, which is causal"
            )
        for key in ("sliding_window", "capacity_factor", "num_experts"):
            if getattr(self, key) < 0:
                raise UserError(f"model.{key} = {getattr(self, key)}: expected 0 or more")
        if self.rope_factor <= 0 or self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise UserError(
                f"model.rope_factor = {self.rope_factor}, rope_low_freq_factor = {self.rope_low_freq_factor}, "
                f"rope_high_freq_factor = {self.rope_high_freq_factor}: expected a positive factor, and low below high"
            )
        if self.num_experts and self.experts_per_token == 1 and self.norm_topk:
            raise UserError(
                "model.norm_topk = True: expected False with experts_per_token = 1, where every weight would be 1 and "
                "the router never learn"
            )
        if not self.num_experts and (self.capacity_factor or self.router != "softmax"):
            raise UserError("model.num_experts = 0: expected no capacity_factor and no router without experts")
        if self.num_experts and (self.mlp_bias or self.sub_norms):
            raise UserError("model.num_experts: experts have neither mlp_bias nor sub_norms")

    @property
    def rotary_dim(self) -> int:
        """Features of a head that turn."""
        return round(self.head_dim * self.rotary_share)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def lfa_reach(self) -> int:
        """Tokens before the present one that the filter sees."""
        return sum(taps - 1 for taps in LFA_TAPS[self.lfa_variant])


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that a token is multiplied by: all matrices, the head included, the embedding table not.

    Of the experts, those that a token is sent to.
    """
    c = config
    own, theirs = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = c.hidden_size * (2 * own + (0 if c.share_qk else theirs) + theirs)
    taps = LFA_TAPS[c.lfa_variant]
    lfa = sum(taps) * c.hidden_size**2 // len(taps) if taps else 0  # a pair of convolutions has half the width
    return c.num_layers * (attention + active_feedforward(c) + lfa) + c.hidden_size * c.vocab_size


def active_feedforward(config: ModelConfig) -> int:
    """Matrix weights of one layer's feed-forward that a token meets: of its experts, and the router."""
    c = config
    one = (3 if c.gated else 2) * c.hidden_size * c.intermediate_size
    router = (3 if c.router == "attention" else 1) * c.hidden_size * c.num_experts
    return one * c.experts_per_token + router if c.num_experts else one


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """6 N + 12 L S H K: forward and backward FLOPs of one token in a sequence of `length` tokens.

    N are the matmul parameters, S the keys that a query sees on average: (T + 1) / 2 of a causal row, fewer with a
    window. Recomputation under remat does not count: this is the numerator of MFU (PaLM, arXiv:2204.02311, appendix
    B, which counts S = T), not of HFU.
    """
    c = config
    window = min(c.sliding_window or length, length)
    seen = (window * (window + 1) / 2 + (length - window) * window) / length if c.causal else length
    attention = 12 * c.num_layers * seen * c.num_heads * c.head_dim
    return 6 * matmul_parameters(config) + attention
