"""Every architecture option, and the entry or paper that it comes from."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lib.params import NonNegative, NonNegativeFloat, Params, Positive, PositiveFloat, parse_params

MATRIX_ROLES = ("attention", "mlp", "embedding", "bigram", "value_embedding", "head")
"""What matrices of the model are for, as `lib.model.parts` has it; a tied head is the embedding."""
KernelName = Literal["auto", "sdpa", "flash2", "flash3", "flash4"]
GATE_DIMS = 12
"""Leading dimensions of its input that a gate reads (#1855), all where there are fewer."""


class LoopParams(Params):
    """Layers that a pass runs through several times, with the same parameters (depth recurrence, #1855)."""

    first: NonNegative
    last: NonNegative
    passes: Annotated[int, Field(ge=2, le=64)]
    """How often, one after the other."""


class ModelParams(Params):
    """Architecture, as checkpoints and artifacts hold it.

    Sources: pr585, pr410 and #1855 are entries of OpenAI's parameter-golf challenge.
    """

    vocab_size: Annotated[int, Field(ge=2, le=65536)]
    """Rows of the token embedding; must equal the tokenizer's vocabulary."""
    bos_id: NonNegative
    """The token that begins every document; must equal the tokenizer's."""
    document_mask: bool
    """Documents do not see each other: attention, smear gate and bigrams treat a BOS as they treat the first position."""
    num_layers: Positive
    model_dim: Positive
    """Width of the residual stream; a multiple of num_heads."""
    num_heads: Positive
    """Query heads."""
    num_kv_heads: Positive
    """Key and value heads; fewer than num_heads is grouped-query attention (arXiv:2305.13245)."""
    mlp_hidden_dim: Positive
    """Width between the two MLP matrices; activation relu(x)^2 (arXiv:2109.08668)."""
    mlp_negative_slope: NonNegativeFloat
    """Slope of the activation below zero, before squaring (#1855: 0.5); 0 is relu."""
    rope_dims: Positive
    """Leading dimensions of each head that are rotated (arXiv:2104.09864); even, above 2, at most the head dimension."""
    rope_base: Annotated[float, Field(gt=1)]
    rope_trained_tokens: Positive | None
    """Longer sequences raise the base by NTK scaling from this length; null: the base is the same at every length (#410 with QAT)."""
    q_gain_init: float
    """Initial value of the learned gain of each query head."""
    num_xsa_layers: NonNegative
    """Last layers whose attention output drops its component along the token's own value (exclusive self-attention)."""
    smear_gate: bool
    """Mix the previous token's embedding into each token through a learned gate per channel."""
    smear_per_token: bool
    """The smear gate is one number for each token, read off its embedding, and closed where a document begins (#1855)."""
    bigram_rows: NonNegative
    """Rows of the hashed bigram embedding; 0 leaves it out."""
    bigram_dim: Positive
    value_embedding_dim: NonNegative
    """Width of the token table shared by value_embedding_layers; 0 leaves it out."""
    value_embedding_layers: tuple[NonNegative, ...]
    """Layers, counted from 0, whose values get the value embedding added."""
    unet_skips: bool
    """The second half of the layers adds the outputs of the first half, last first, each through a learned vector."""
    skip_gates: bool
    """Instead of adding an earlier output, learned gates per channel mix it with the stream (#1855)."""
    attention_gate: bool
    """The output of each head is scaled by a gate that reads the input of the layer (sparse attention gate, #1855)."""
    parallel_from: NonNegative | None
    """From this layer on, attention and MLP work side by side on two lanes of the stream, whose mean goes to the head (#1855); null: no
    layer. A layer of the second half, and behind the loop."""
    loop: LoopParams | None
    """Layers that are run through several times; null: none. Training may begin without (`train.loop_start`)."""
    residual_mix: bool
    """Each block starts from a learned mix of the residual stream and the embedding."""
    ln_scale: bool
    """Scale the normalised input of layer n (from 0) by 1/sqrt(n+1)."""
    tied_head: bool
    """The output head is the token embedding."""
    logit_softcap: PositiveFloat
    """Logits are softcap * tanh(z / softcap) (Gemma 2, arXiv:2408.00118)."""
    embedding_init_std: PositiveFloat

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the matrices that the model has, some of `MATRIX_ROLES`."""
        missing = {"bigram": not self.bigram_rows, "value_embedding": not self.value_embedding_dim, "head": self.tied_head}
        return tuple(role for role in MATRIX_ROLES if not missing.get(role))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads together."""
        return self.head_dim * self.num_kv_heads

    def layer_order(self, *, looped: bool = True) -> list[int]:
        """The layers as a pass runs through them, with the repetitions of the loop or without."""
        layers = list(range(self.num_layers))
        if self.loop is None or not looped:
            return layers
        first, end = self.loop.first, self.loop.last + 1
        return layers[:first] + self.loop.passes * layers[first:end] + layers[end:]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bos_id >= self.vocab_size:
            raise ValueError(f"bos_id: expected a token below vocab_size {self.vocab_size}, found {self.bos_id}")
        if self.model_dim % self.num_heads:
            raise ValueError(f"num_heads: expected a divisor of model_dim {self.model_dim}, found {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads {self.num_heads}, found {self.num_kv_heads}")
        if self.rope_dims % 2 or not 2 < self.rope_dims <= self.head_dim:  # the NTK exponent divides by rope_dims - 2
            raise ValueError(f"rope_dims: expected an even number from 4 to the head dimension {self.head_dim}, found {self.rope_dims}")
        if self.num_xsa_layers > self.num_layers:
            raise ValueError(f"num_xsa_layers: expected at most num_layers {self.num_layers}, found {self.num_xsa_layers}")
        if self.bigram_rows == 1:
            raise ValueError("bigram_rows: expected 0 or at least 2 (the last row is for the first position), found 1")
        if bool(self.value_embedding_dim) != bool(self.value_embedding_layers):
            raise ValueError("value_embedding_layers: expected at least one layer exactly when value_embedding_dim is not 0")
        layers = self.value_embedding_layers
        if list(layers) != sorted(set(layers)) or any(layer >= self.num_layers for layer in layers):
            raise ValueError(f"value_embedding_layers: expected ascending layers below {self.num_layers}, found {list(layers)}")
        if self.loop is not None and not self.loop.first <= self.loop.last < self.num_layers:
            raise ValueError(f"loop: expected layers first <= last < num_layers {self.num_layers}, found {self.loop.first} and "
                             f"{self.loop.last}")
        if self.skip_gates and not self.unet_skips:
            raise ValueError("skip_gates: expected false where unet_skips is, found true")
        earliest = max(self.num_layers // 2, 0 if self.loop is None else self.loop.last + 1)
        if self.parallel_from is not None and not earliest <= self.parallel_from < self.num_layers:
            raise ValueError(f"parallel_from: expected a layer of the second half behind the loop, {earliest} to {self.num_layers - 1}, or "
                             f"null, found {self.parallel_from}")
        return self


NEUTRAL: dict[str, Any] = {
    "bos_id": 1,  # of every tokenizer until then
    "document_mask": False,
    "mlp_negative_slope": 0.0,
    "smear_per_token": False,
    "skip_gates": False,
    "attention_gate": False,
    "parallel_from": None,
    "loop": None,
}
"""Keys that came later -> the value with which a model is what it was without them: that of files from before, which do not have them."""


def parse_model(values: dict[str, Any], prefix: str) -> ModelParams:
    """The configuration that a checkpoint or an artifact holds, with `NEUTRAL` values for the keys that it lacks.

    Args:
        values: fields of `ModelParams`.
        prefix: goes before each key in errors.

    Raises:
        ParamsError: a key that is unknown, missing though it has no neutral value, mistyped or out of range.
    """
    return parse_params(NEUTRAL | values, ModelParams, prefix)


class ModelSection(ModelParams):
    """Section ``model``: the architecture, and what runs it on this machine."""

    attention: KernelName
    """Attention kernel, see lib/model/kernels.py; auto takes the best that this machine can use."""

    @property
    def architecture(self) -> ModelParams:
        """The part that is a property of the model."""
        return ModelParams(**self.model_dump(exclude={"attention"}))
