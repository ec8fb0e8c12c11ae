# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Any language model of transformers, whole, inside an Aurea.

    a `...ForCausalLM` ─┬─ its decoder           becomes `AureaModel.language_model`, with blocks woven into its layers
                        ├─ its head's modules    become the Aurea's own, under the names they have (`lm_head`, …)
                        └─ what is left of it    `causal_lm`: the class itself, which computes over these

So whatever a language model does besides its decoder is done by its own code: heads of several layers, scales and caps
of the logits, losses of routers, what it prepares for each step of a generation. Nothing of it is made again here, and
no family is known by name. Whether a decoder can carry cross-attention is told by what it does when it is run.
"""

from collections.abc import Callable
from contextlib import contextmanager, suppress
from inspect import signature
from operator import attrgetter

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput
from transformers.utils import logging

from .configuration_aurea import AureaConfig, AureaUnfitLanguageModelError, optional_field
from .cross_attention_aurea import decoder_layers
from .weaving_aurea import copy_on_meta, woven_class


logger = logging.get_logger(__name__)


def decoder_of(causal_lm: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """Name and module of the decoder in a `...ForCausalLM`: its one child that is a model of its own.

    Raises:
        AureaUnfitLanguageModelError: there is none, or more than one; it has no input embeddings, or its head takes no
            `logits_to_keep`.
    """
    models = [(name, child) for name, child in causal_lm.named_children() if isinstance(child, PreTrainedModel)]
    if len(models) != 1:
        raise AureaUnfitLanguageModelError(
            causal_lm.config,
            f"whose {type(causal_lm).__name__} has {len(models)} models inside, where one is looked for: its decoder",
        )
    name, decoder = models[0]
    if "logits_to_keep" not in signature(causal_lm.forward).parameters:
        raise AureaUnfitLanguageModelError(
            causal_lm.config, f"whose {type(causal_lm).__name__} takes no `logits_to_keep`"
        )
    try:
        decoder.get_input_embeddings()
    except NotImplementedError:
        raise AureaUnfitLanguageModelError(
            causal_lm.config, f"whose {type(decoder).__name__} does not tell its input embeddings"
        ) from None
    return name, decoder


def check_is_decoder(text_config: PreTrainedConfig) -> None:
    """Raises AureaUnfitLanguageModelError unless it configures a decoder language model of transformers."""
    if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise AureaUnfitLanguageModelError(text_config, "which is not a decoder language model of transformers")
    if type(text_config) in MODEL_FOR_MASKED_LM_MAPPING and not optional_field(text_config, "is_decoder"):
        raise AureaUnfitLanguageModelError(
            text_config, "which is not a decoder language model: it reads both ways, unless its `is_decoder` is set"
        )


def make_causal_lm(config: AureaConfig) -> PreTrainedModel:
    """The language model of `config.text_config`, with its head; raises what `check_is_decoder` does."""
    check_is_decoder(config.text_config)
    if config.lm_head_type == "linear":
        return AureaLinearHeadForCausalLM(AutoModel.from_config(config.text_config))
    return AutoModelForCausalLM.from_config(config.text_config)


class AureaLinearHeadForCausalLM(PreTrainedModel, GenerationMixin):
    """Any decoder with one linear layer for a head, whatever its own head would do to the logits."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, decoder: PreTrainedModel):
        config = decoder.config
        # A copy, which says nothing of attention and experts: those are the decoder's to choose.
        super().__init__(type(config).from_dict(config.to_dict()))
        self.model, self.config = decoder, config
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False, dtype=decoder.dtype)
        self.post_init()

    def forward(
        self, labels: torch.LongTensor | None = None, logits_to_keep: int | torch.Tensor = 0, **kwargs
    ) -> CausalLMOutputWithPast:
        """Arguments beside those of the decoder are `labels` and `logits_to_keep`, as in any causal language model."""
        hidden_states = self.model(**kwargs).last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(hidden_states[:, kept]), None  # (batch, T, vocabulary)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class _Reached(Exception):
    """In the place of a decoder's output: tells that it reached the head, which need not be run for that."""


class AureaDecoderStandIn:
    """In the place of a decoder that has run: called, it gives the output handed to it; else it is the decoder.

    Args:
        owner: the model whose decoder it stands for, whichever that is at the time.
        path: names that lead from there to a model inside, past which a few heads reach (OPT's).
    """

    def __init__(self, owner: PreTrainedModel, path: tuple[str, ...] = ()):
        self._owner = owner
        self._path = path

    def __call__(self, *args, decoder_output: ModelOutput | None = None, **kwargs) -> ModelOutput:
        if decoder_output is None:
            raise AureaUnfitLanguageModelError(
                self._owner.get_decoder().config,
                "whose head does not hand keyword arguments on to its decoder, whose output could not reach it",
            )
        if isinstance(decoder_output, _Reached):
            raise decoder_output
        return decoder_output

    def __getattr__(self, name: str):
        if "_path" not in self.__dict__:  # while it is being copied
            raise AttributeError(name)
        value = attrgetter(".".join((*self._path, name)))(self._owner.get_decoder())
        return AureaDecoderStandIn(self._owner, (*self._path, name)) if isinstance(value, PreTrainedModel) else value


class AureaModulelessCausalLMMixin:
    """A `...ForCausalLM` whose modules are its owner's, and in whose decoder's place is an `AureaDecoderStandIn`.

    It is no submodule of its owner, hence in no state dict, plan or hook: these know the owner's modules, which may be
    replaced there (LoRA, quantisation, resizing) and are looked up on each call.
    """

    owner: PreTrainedModel
    decoder_name: str

    def __getattr__(self, name: str):
        return getattr(self.__dict__["owner"], name)

    def __setattr__(self, name: str, value):
        setattr(self.owner, name, value) if isinstance(value, nn.Module) else super().__setattr__(name, value)

    device = property(lambda self: self.owner.device)
    dtype = property(lambda self: self.owner.dtype)
    training = property(lambda self: self.owner.training)
    vocab_size = property(lambda self: self.owner.vocab_size)


def name_in_owner(name: str, prefix: str, decoder: str) -> str:
    """The name of a weight of a `...ForCausalLM`, whose decoder is `prefix`, where the decoder is called `decoder`."""
    return f"{decoder}{name.removeprefix(prefix)}" if name.startswith(f"{prefix}.") else name


def hand_over_head(causal_lm: PreTrainedModel, owner: PreTrainedModel, decoder: str) -> None:
    """Makes the head's modules the owner's, under their names, and the rest `owner.causal_lm`.

    Args:
        decoder: the name that the decoder has in `owner`, for weights that head and decoder share.

    Raises:
        AureaUnfitLanguageModelError: the decoder's output does not reach the head.
    """
    prefix, _ = decoder_of(causal_lm)
    delattr(causal_lm, prefix)
    modules = dict(causal_lm.named_children())
    parameters = dict(causal_lm.named_parameters(recurse=False))
    buffers = dict(causal_lm.named_buffers(recurse=False))
    saved = causal_lm.state_dict()
    for name, module in modules.items():
        owner.register_module(name, module)
    for name, parameter in parameters.items():
        owner.register_parameter(name, parameter)
    for name, buffer in buffers.items():
        owner.register_buffer(name, buffer, persistent=name in saved)
    for name in (*modules, *parameters, *buffers):
        delattr(causal_lm, name)
    tied = causal_lm._tied_weights_keys or {}
    owner._tied_weights_keys = {
        name_in_owner(target, prefix, decoder): name_in_owner(source, prefix, decoder)
        for target, source in tied.items()
    }
    owner._is_stateful = causal_lm._is_stateful
    owner._can_compile_fullgraph = causal_lm._can_compile_fullgraph
    owner.vocab_size = causal_lm.config.vocab_size
    causal_lm.__class__ = woven_class(AureaModulelessCausalLMMixin, type(causal_lm))
    give_causal_lm(causal_lm, prefix, owner)
    with suppress(_Reached, RuntimeError):  # as far as where its decoder stood; a run without data may fail before
        causal_lm(input_ids=torch.zeros(1, 1, dtype=torch.long, device="meta"), decoder_output=_Reached())


def give_causal_lm(causal_lm: PreTrainedModel, prefix: str, owner: PreTrainedModel) -> None:
    """Makes them know each other. Not by assignment: they would become submodules."""
    causal_lm.__dict__ |= {"owner": owner, "decoder_name": prefix, prefix: AureaDecoderStandIn(owner)}
    owner.__dict__["_causal_lm"] = causal_lm


@contextmanager
def watched_layers(decoder: PreTrainedModel):
    """While the decoder is run with visual states, sees to it that they reach all its layers.

    Raises:
        AureaUnfitLanguageModelError: they do not, or a layer's hidden states are not `(batch, tokens, hidden_size)`.
    """
    layers = decoder_layers(decoder)[1]
    reached = set()

    def look(layer: nn.Module, arguments: tuple):
        hidden_states, *_, visual_states = arguments
        if visual_states is None:
            raise AureaUnfitLanguageModelError(
                decoder.config,
                f"whose {type(decoder).__name__} does not hand keyword arguments on to its layers: the visual states "
                "could not reach the cross-attention blocks",
            )
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != decoder.config.hidden_size:
            raise AureaUnfitLanguageModelError(
                decoder.config,
                f"whose layers' hidden states have the shape {tuple(hidden_states.shape)}, not (batch, tokens, "
                f"{decoder.config.hidden_size})",
            )
        reached.add(layer)

    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if decoder.training:
        return  # in which a layer may be dropped
    if missed := [idx for idx, layer in enumerate(layers) if layer not in reached]:
        raise AureaUnfitLanguageModelError(
            decoder.config, f"whose {type(decoder).__name__} does not call its layers {missed} as modules"
        )


@torch.no_grad()
def carries_cross_attention(decoder: PreTrainedModel) -> bool:
    """Whether the woven decoder was seen to carry visual states to its layers; False if it could not be run.

    Two tokens pass through a copy of it on the meta device and, if that cannot be, through it where its weights are.

    Raises:
        AureaUnfitLanguageModelError: it was run, and does not carry them.
    """
    makers = [lambda: copy_on_meta(decoder)]
    if decoder.device.type != "meta":
        makers.append(lambda: decoder)
    was_training = decoder.training
    decoder.eval()
    try:
        return any(_was_carried(make) for make in makers)
    finally:
        decoder.train(was_training)


def _was_carried(make_decoder: Callable[[], PreTrainedModel]) -> bool:
    """Whether a decoder was run with visual states, and they reached its layers; False if it could not be run."""
    try:
        model = make_decoder()
        settings = {"dtype": model.dtype, "device": model.device}
        with watched_layers(model):
            model(
                input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device),
                attention_mask=torch.zeros(1, 1, 2, 2, **settings),  # as it is added to the scores
                position_ids=torch.arange(2, device=model.device)[None],
                cross_attention_states=torch.zeros(1, 1, model.config.hidden_size, **settings),
                use_cache=False,
            )
        return True
    except AureaUnfitLanguageModelError:
        raise
    except (RuntimeError, ValueError) as error:
        # For want of data, or of a mask of another shape. It says nothing of the layers; the first picture will.
        logger.debug(f"{type(error).__name__} in the trial run of a language model: {error}")
        return False
