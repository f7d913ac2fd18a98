"""The language model: one class with every architecture option of pr585, pr410 and #1855, and one forward pass.

What it has that a plain transformer has not, each switched by a key of `ModelParams`: hashed bigram embedding, smear gates,
U-Net skips with gates, residual mix with the embedding, per-layer input scale, shared value embedding, partial RoPE with NTK scaling,
query gains, exclusive self-attention, gates of heads, documents that do not see each other, leaky relu^2, layers that run several times,
parallel lanes, tied head, soft-capped logits. RMSNorm has no parameters. A position that does not see the one before it - the first of a
sequence, and with the document mask a BOS - is a start.

Shapes: B batch, T tokens, P wanted positions, D model, V vocabulary. The residual stream is (B, T, D); from the first parallel layer on it
has two lanes, (2, B, T, D), that of attention and that of the MLP.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.errors import UserError
from lib.model.attention import ALL_POSITIONS, Rotation, make_rotation, make_scope, rms_norm
from lib.model.blocks import Block, Entry, ParallelBlock, Skip, enter
from lib.model.compilation import call
from lib.model.config import ModelParams, parse_model
from lib.model.embedding import BigramHash, SmearGate, TokenSmearGate, ValueEmbedding
from lib.model.linear import Linear, LowRank, add_low_rank
from lib.model.loss import softcapped_cross_entropy
from lib.model.parts import Declared
from lib.model.sdpa import SDPA, Kernel


class TiedHead(nn.Module):
    """The output head that is the token embedding; a module, so that calibration sees its input and output."""

    def forward(self, x: Tensor, weight: Tensor, adapter: LowRank | None = None) -> Tensor:
        """(B, P, D) and (V, D) -> (B, P, V)."""
        return add_low_rank(F.linear(x, weight), x, adapter)


class Start(NamedTuple):
    """What the blocks start from.

    Attributes:
        x0: embedding (B, T, D).
        x: (B, T, D), residual stream in the first block.
        y: (B, T, D), its normalised inputs.
        added_values: layer -> value embedding (B, T, K*E).
        rotation: rotation of the T positions.
        input_scales: (L,) fp32 of the normalised inputs of the L layers; None for 1.
    """

    x0: Tensor
    x: Tensor
    y: Tensor
    added_values: dict[int, Tensor]
    rotation: Rotation
    input_scales: Tensor | None


class GPT(nn.Module):
    """The model; parameters are uninitialised until `lib.model.initialization.initialize` or `load_state_dict`.

    Attributes:
        adapters: what is added while it is there: name of a layer -> adapters for each block in `ModelParams.layer_order`, or for the head.
    """

    PARTS: ClassVar[dict[str, Declared]] = {
        "token_embedding.weight": Declared("embedding", reader="head"),
        "bigram.table.weight": Declared("bigram"),
        "bigram.projection.weight": Declared("bigram"),
        "bigram.scale": Declared("bigram_scale"),
        **{f"smear_gate.{name}": Declared("smear_gate") for name in ("gate", "weight", "factor")},
        "value_embedding.table.weight": Declared("value_embedding"),
        "value_embedding.projection.weight": Declared("value_embedding"),
        "value_embedding.scale": Declared("value_embedding_scale"),
        "value_embedding.layer_scales": Declared("value_embedding_scale"),
        **{f"blocks.*.attention.{layer}.weight": Declared("attention", "blocks.*.attention.input") for layer in ("query", "key", "value")},
        "blocks.*.attention.output.weight": Declared("attention", row_scale="blocks.*.attention_scale"),
        "blocks.*.attention.q_gain": Declared("q_gain"),
        "blocks.*.attention.gate": Declared("attention_gate"),
        "blocks.*.attention_scale": Declared("block_scale"),
        "blocks.*.mlp.up.weight": Declared("mlp"),
        "blocks.*.mlp.down.weight": Declared("mlp", row_scale="blocks.*.mlp_scale"),
        "blocks.*.mlp_scale": Declared("block_scale"),
        "blocks.*.residual_mix": Declared("residual_mix"),
        "blocks.*.lane_residual": Declared("lanes"),
        "blocks.*.lane_outputs": Declared("lanes"),
        "skip_weights": Declared("skip_weights"),
        "skip_gates": Declared("skip_gates"),
        "head.weight": Declared("head"),
    }
    """What `lib.model.parts` cannot tell from the types of the modules."""

    skip_weights: nn.Parameter | None
    skip_gates: nn.Parameter | None

    def __init__(self, params: ModelParams, kernel: Kernel = SDPA) -> None:
        super().__init__()
        self.params = params
        self.kernel = kernel
        self.adapters: dict[str, Sequence[LowRank]] = {}
        self.token_embedding = nn.Embedding(params.vocab_size, params.model_dim)
        self.bigram = BigramHash(params) if params.bigram_rows else None
        self.smear_gate = (TokenSmearGate if params.smear_per_token else SmearGate)(params) if params.smear_gate else None
        self.value_embedding = ValueEmbedding(params) if params.value_embedding_dim else None
        first_parallel = params.num_layers if params.parallel_from is None else params.parallel_from
        self.blocks = nn.ModuleList((Block if layer < first_parallel else ParallelBlock)(params, layer)
                                    for layer in range(params.num_layers))
        num_skips = len(params.layer_order()) // 2
        for name, exists in (("skip_weights", params.unet_skips), ("skip_gates", params.skip_gates)):
            self.register_parameter(name, nn.Parameter(torch.empty(num_skips, params.model_dim)) if num_skips and exists else None)
        self.head = TiedHead() if params.tied_head else Linear(params.model_dim, params.vocab_size)

    @property
    def num_parameters(self) -> int:
        """Number of weights, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, tokens: Tensor, targets: Tensor, positions: slice = ALL_POSITIONS, attention_tokens: int | None = None, *,
                starts: Tensor | None = None, looped: bool = True, compiled: bool = False) -> Tensor:
        """Cross-entropy of the targets at chosen positions.

        Args:
            tokens: (B, T) int64 inputs.
            targets: (B, P) int64, the tokens that follow the chosen positions; (K, B, P) for K tokens at each, without gradients of any
                but the first.
            positions: the P of the T positions that are scored.
            attention_tokens: how many tokens a position attends to at most, itself included; None for all.
            starts: (B, T) bool, true at position 0 and wherever a part of a row begins that sees nothing before it; None for the documents
                of a model with document mask, or nowhere else. Parts that are given have at most `attention_tokens` tokens. The smear
                gate of tokens goes by documents whatever it says.
            looped: whether the layers of the loop are run through several times; False only early in training.
            compiled: whether embedding, blocks and head run through ``torch.compile``, each shape anew.

        Returns:
            (B, P) fp32 nats, (K, B, P) for so many targets.
        """
        y = self._run_blocks(tokens, positions, attention_tokens, starts, looped=looped, compiled=compiled)
        return call(_losses, self, y, targets, self._head_adapter, compiled=compiled)

    def logits(self, tokens: Tensor, positions: slice = ALL_POSITIONS, attention_tokens: int | None = None,
               starts: Tensor | None = None) -> Tensor:
        """Soft-capped logits (B, P, V) fp32 for the token after each chosen position of `tokens` (B, T) int64; arguments of `forward`."""
        cap = self.params.logit_softcap
        y = self._run_blocks(tokens, positions, attention_tokens, starts, looped=True, compiled=False)
        return cap * torch.tanh(self.head_outputs(y, self._head_adapter).float() / cap)

    def head_outputs(self, y: Tensor, adapter: LowRank | None = None) -> Tensor:
        """(B, P, V) before the soft cap, in the dtype of matrix products, from the normalised outputs (B, P, D) of the last block."""
        return self.head(y, self.token_embedding.weight, adapter=adapter) if self.params.tied_head else self.head(y, adapter=adapter)

    @property
    def _head_adapter(self) -> LowRank | None:
        return next(iter(self.adapters.get("head", ())), None)

    def _run_blocks(self, tokens: Tensor, positions: slice, attention_tokens: int | None, starts: Tensor | None, *, looped: bool,
                    compiled: bool) -> Tensor:
        """The normalised outputs of the last block, (B, P, D); that block computes nothing for other positions.

        The first half of the blocks that are run through, repetitions included, leave their outputs for skips: with S of them block
        S + n takes that of block S - 1 - n.
        """
        is_packed = starts is not None
        if starts is None and self.params.document_mask:
            starts = self._starts(tokens)
        x0, x, y, added_values, rotation, input_scales = call(GPT.start, self, tokens, starts, attention_tokens, compiled=compiled)
        scope = partial(make_scope, self.kernel, rotation, attention_tokens=attention_tokens, starts=starts, is_packed=is_packed)
        everywhere = scope(positions=ALL_POSITIONS)
        at_positions = everywhere if positions == ALL_POSITIONS else scope(positions=positions)
        order = self.params.layer_order(looped=looped)
        num_skips = 0 if self.skip_weights is None else len(order) // 2
        kept: list[Tensor] = []
        for place, layer in enumerate(order, 1):
            adapters = {name: of_passes[place - 1] for name, of_passes in self.adapters.items() if name != "head"}
            block, is_last = self.blocks[layer], place == len(order)
            assert isinstance(block, Block)
            x, y = call(type(block).attend, block, x, y, at_positions if is_last else everywhere, added_values.get(layer),
                        None if input_scales is None else input_scales[layer], adapters=adapters, compiled=compiled)
            skip = self._skip(place - num_skips, kept) if num_skips <= place < 2 * num_skips else None
            entry = Entry() if is_last else self._entry(order[place], input_scales, skip)
            x, y, output = call(type(block).transform, block, x, y, x0, entry, place < num_skips, adapters=adapters, compiled=compiled)
            if output is not None:
                kept.append(output)
        return y

    def start(self, tokens: Tensor, starts: Tensor | None, attention_tokens: int | None) -> Start:
        """What the blocks start from: `tokens` (B, T) int64, `starts` (B, T) bool or None for position 0 alone."""
        x = self.token_embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):  # then the residual stream is bf16 too: half the memory traffic
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.bigram is not None:
            x = x + self.bigram(tokens, starts)
        if isinstance(self.smear_gate, TokenSmearGate):
            x = self.smear_gate(x, self._starts(tokens))
        x = rms_norm(x)
        if isinstance(self.smear_gate, SmearGate):
            x = self.smear_gate(x, starts)
        rotation = make_rotation(self.params, tokens.shape[1], attention_tokens, tokens.device)
        layers = torch.arange(1, self.params.num_layers + 1, dtype=torch.float64, device=tokens.device)
        input_scales = layers.sqrt().reciprocal().float() if self.params.ln_scale else None
        added_values = self.value_embedding(tokens) if self.value_embedding is not None else {}
        return Start(x, *enter(x, x, self._entry(0, input_scales, None)), added_values, rotation, input_scales)

    def _skip(self, n: int, kept: list[Tensor]) -> Skip:
        """Skip number `n`, which takes the last output that was `kept`; that of the block just before, for skip 0, is the stream itself."""
        assert self.skip_weights is not None
        return Skip(self.skip_weights[n], None if self.skip_gates is None else self.skip_gates[n], kept.pop() if n else None)

    def _entry(self, layer: int, input_scales: Tensor | None, skip: Skip | None) -> Entry:
        """The entry to a block."""
        block = self.blocks[layer]
        assert isinstance(block, Block)
        return Entry(skip, block.residual_mix, None if input_scales is None else input_scales[layer], isinstance(block, ParallelBlock))

    def _starts(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T) bool: true at position 0 and where a document begins."""
        starts = tokens == self.params.bos_id
        starts[:, 0] = True
        return starts


def _losses(model: GPT, y: Tensor, targets: Tensor, adapter: LowRank | None) -> Tensor:
    """Losses fp32 of `targets` (B, P) or (K, B, P), from the normalised outputs `y` (B, P, D) of the last block and the
    adapter of the head.

    Those of the first target take a sum over the vocabulary, the others' differ from them by logits.
    """
    z, cap = model.head_outputs(y, adapter), model.params.logit_softcap
    first = targets if targets.dim() == 2 else targets[0]
    losses = softcapped_cross_entropy(z.flatten(0, 1), first.flatten(), cap).view(first.shape)
    if targets.dim() == 2:
        return losses
    logits = cap * torch.tanh(z.detach().gather(-1, targets.movedim(0, -1)).float() / cap).movedim(-1, 0)
    return losses + (logits[0] - logits)


def outline(model: dict[str, Any]) -> GPT:
    """A model without values, on the device meta: names, shapes and parts of its parameters.

    Args:
        model: the fields of `ModelParams`.

    Raises:
        ParamsError: the configuration is not valid.
        UserError: sizes beyond those of any tensor.
    """
    params = parse_model(model, "model configuration: ")
    try:
        with torch.device("meta"):
            return GPT(params)
    except RuntimeError as error:
        raise UserError(f"model configuration: expected sizes that a model can have, found others ({str(error).splitlines()[0]})") from None


def build_model(model: dict[str, Any], weights: dict[str, Tensor], kernel: Kernel = SDPA) -> GPT:
    """A model for inference from its configuration and weights, as a checkpoint or an artifact holds them.

    Args:
        model: the fields of `ModelParams`.
        weights: parameter name -> tensor; names and shapes must be exactly the model's.
        kernel: the kernel that computes attention.

    Raises:
        ParamsError: the configuration is not valid.
        UserError: weights are missing, unexpected or of another shape.
    """
    params = parse_model(model, "model configuration: ")
    layers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(layers) != params.num_layers:  # before so many are built
        raise UserError(f"weights do not fit the model configuration: expected num_layers {params.num_layers}, found weights of "
                        f"{len(layers)} layers")
    gpt = outline(model)
    gpt.kernel = kernel
    expected = {name: tuple(parameter.shape) for name, parameter in gpt.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        differences = [f"{name}: expected {expected.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
                       for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
        raise UserError("weights do not fit the model configuration: " + "; ".join(differences[:5]))
    gpt.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return gpt.eval().requires_grad_(True)
