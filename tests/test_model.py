"""The model computes what Llama computes, and never looks ahead."""

import math

import pytest
import torch
import torch.nn.functional as F

from config.schema import ModelConfig
from model import SEPARATOR, KVCache, Transformer, count_parameters, flash_attention, flops_per_token, story_mask
from training.batch_size import estimate_memory

TINY = {"vocab_size": 300, "d_model": 48, "n_layers": 3, "n_heads": 4, "d_ffn": 80, "max_seq_len": 32, "dropout": 0.0}


def make_model(**changes) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():  # other gains than 1, and sharper attention than at the start, so that differences show
        for name, parameter in model.named_parameters():
            parameter.mul_(2 if "attention.w" in name else 1).add_(0.1 * torch.randn_like(parameter))
    return model


def random_tokens(model: Transformer, batch: int = 2, seq_len: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (batch, seq_len), generator=generator)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_transformers(kv_heads, tied):
    transformers = pytest.importorskip("transformers")
    model = make_model(n_kv_heads=kv_heads, tie_embeddings=tied, rope_percentage=1.0, rope_base=500.0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=300, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=80, max_position_embeddings=32, rms_norm_eps=model.config.rms_norm_eps,
        tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 500.0})).eval()
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "lm_head": "output"}
    ours = model.state_dict()
    state = {}
    for name in theirs.state_dict():
        mine = name.removeprefix("model.")
        for their_part, our_part in names.items():
            mine = mine.replace(their_part, our_part)
        state[name] = ours[mine]
    theirs.load_state_dict(state)
    tokens = random_tokens(model)
    with torch.no_grad():
        logits, reference = model(tokens), theirs(tokens).logits
    assert reference.abs().max() > 1  # else agreement would say little
    torch.testing.assert_close(logits, reference, atol=1e-4, rtol=1e-4)


def reference_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """One sequence in float64, by loops over positions and heads: the model's weights, but none of its code."""
    config, weights = model.config, {k: v.double() for k, v in model.state_dict().items()}
    head_dim, rotary = config.d_model // config.n_heads, config.rotary_dim
    kv_heads = config.n_kv_heads or config.n_heads

    def norm(x, gain):
        return x / torch.sqrt((x * x).mean() + config.rms_norm_eps) * gain

    def rotate(x, position):
        out = x.clone()
        for i in range(rotary // 2):
            angle = position * config.rope_base ** (-2 * i / rotary)
            a, b = x[i], x[i + rotary // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + rotary // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    stream = [weights["tok_embeddings.weight"][t] for t in tokens]
    for layer in range(config.n_layers):
        w = {k.removeprefix(f"layers.{layer}."): v for k, v in weights.items() if k.startswith(f"layers.{layer}.")}
        normed = [norm(x, w["attention_norm.weight"]) for x in stream]
        heads = [torch.zeros(config.d_model, dtype=torch.float64) for _ in stream]
        for h in range(config.n_heads):
            g = h // (config.n_heads // kv_heads)
            mine, shared = slice(h * head_dim, (h + 1) * head_dim), slice(g * head_dim, (g + 1) * head_dim)
            q = [rotate(w["attention.wq.weight"][mine] @ x, p) for p, x in enumerate(normed)]
            k = [rotate(w["attention.wk.weight"][shared] @ x, p) for p, x in enumerate(normed)]
            v = [w["attention.wv.weight"][shared] @ x for x in normed]
            for t in range(len(stream)):
                scores = torch.stack([q[t] @ k[s] / math.sqrt(head_dim) for s in range(t + 1)])
                heads[t][mine] = sum(p * v[s] for s, p in enumerate(torch.exp(scores) / torch.exp(scores).sum()))
        stream = [x + w["attention.wo.weight"] @ heads[t] for t, x in enumerate(stream)]
        for t, x in enumerate(stream):
            y = norm(x, w["ffn_norm.weight"])
            gate = w["feed_forward.w1.weight"] @ y
            gated = gate / (1 + torch.exp(-gate)) * (w["feed_forward.w3.weight"] @ y)
            stream[t] = x + w["feed_forward.w2.weight"] @ gated
    return torch.stack([weights["output.weight"] @ norm(x, weights["norm.weight"]) for x in stream])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("flash", [True, False])
def test_partial_rotation_equals_a_float64_reference(share, flash):
    model = make_model(rope_percentage=share, n_kv_heads=2, use_flash_attention=flash)
    tokens = random_tokens(model, batch=1, seq_len=12)
    with torch.no_grad():
        logits = model(tokens)[0]
    torch.testing.assert_close(logits.double(), reference_logits(model, tokens[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flash", [True, False])
def test_a_later_token_never_changes_an_earlier_logit(flash):
    model = make_model(use_flash_attention=flash, n_kv_heads=2)
    tokens = random_tokens(model)
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amax(dim=-1).min() > 1e-4  # and every later one sees it


@pytest.mark.parametrize("flash", [True, False])
def test_a_masked_story_is_read_as_if_it_were_alone(flash):
    """No information crosses a separator; the rest of a story at the start of a sequence counts as one, too."""
    model = make_model(use_flash_attention=flash, n_kv_heads=2, mask_stories=True)
    tokens, starts = random_tokens(model).clamp(min=1), (0, 9, 10, 23)
    tokens[:, starts[1:]] = SEPARATOR
    changed = tokens.clone()
    changed[:, [3, 15]] += 1
    with torch.no_grad():
        logits, after = model(tokens), model(changed % model.config.vocab_size)
        for start, end in zip(starts, (*starts[1:], 32), strict=True):
            alone = model(tokens[:, start:end])
            torch.testing.assert_close(logits[:, start:end], alone, atol=1e-4, rtol=1e-4)
    same = [torch.equal(logits[:, place], after[:, place]) for place in range(32)]
    assert same == [True] * 3 + [False] * 6 + [True] * 6 + [False] * 8 + [True] * 9


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_cache_changes_nothing(flash, kv_heads):
    model = make_model(n_kv_heads=kv_heads, use_flash_attention=flash)
    tokens = random_tokens(model)
    cache = KVCache(model.config, 2, 32, torch.device("cpu"))
    with torch.no_grad():
        whole = model(tokens)
        pieces = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 7), (7, 8), (8, 13), (13, 14), (14, 32))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)
    assert cache.length == 32


def test_the_model_does_not_shift_its_targets():
    model = make_model()
    tokens, targets = random_tokens(model), random_tokens(model).flip(0).roll(3, dims=1)
    with torch.no_grad():
        logits, loss, losses = model(tokens), model(tokens, targets), model(tokens, targets, reduction="none")
    expected = -logits.double().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)  # (2, 32)
    torch.testing.assert_close(losses.double(), expected, atol=1e-4, rtol=1e-4)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_shapes_and_ignored_targets():
    model = make_model()
    tokens = random_tokens(model)
    targets = tokens.clone()
    targets[0, :16] = -100
    with torch.no_grad():
        logits = model(tokens)
        loss, losses = model(tokens, targets), model(tokens, targets, reduction="none")
    assert logits.shape == (2, 32, 300) and loss.shape == () and losses.shape == (2, 32)
    assert losses[0, :16].eq(0).all()
    assert loss.item() == pytest.approx(losses.sum().item() / 48, rel=1e-5)


@pytest.mark.parametrize("shape", [
    (448, 7, 7, 1344), (768, 8, 8, 2048), (288, 6, 6, 768), (160, 3, 5, 432), (64, 5, 8, 172)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_first_loss_is_ln_of_the_vocabulary(shape, tied):
    d_model, n_layers, n_heads, d_ffn = shape
    torch.manual_seed(2)
    config = ModelConfig(d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_ffn=d_ffn, tie_embeddings=tied)
    model = Transformer(config)
    tokens = random_tokens(model, 4, 65)
    with torch.no_grad():
        loss = model(tokens[:, :-1], tokens[:, 1:]).item()
    assert loss == pytest.approx(math.log(config.vocab_size), rel=0.05)


def test_the_main_model_has_the_designs_numbers():
    model = Transformer(ModelConfig())
    assert count_parameters(model) == 22_750_784
    assert model.tok_embeddings.weight is model.output.weight
    assert flops_per_token(model) == 6 * 22_750_784 + 6 * 7 * 448 * 512 == 146_138_496


def test_an_untied_embedding_is_counted_but_not_multiplied():
    tied, untied = make_model(), make_model(tie_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == 300 * 48
    assert flops_per_token(untied) == flops_per_token(tied)


@pytest.mark.parametrize("masked", [False, True])
def test_both_attentions_and_recomputation_give_the_same_gradients(masked):
    gradients = []
    for changes, recompute in (({}, False), ({}, True), ({"use_flash_attention": False}, False)):
        model = make_model(**changes, mask_stories=masked).train()
        model.gradient_checkpointing = recompute
        tokens = random_tokens(model)
        tokens[:, 13] = SEPARATOR
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0], atol=1e-5, rtol=1e-3)


def test_dropout_acts_in_training_only_and_not_on_the_attention_probabilities():
    model = make_model(dropout=0.5)
    tokens = random_tokens(model)
    with torch.no_grad():
        assert torch.equal(model(tokens), model(tokens))
        model.train()
        assert not torch.equal(model(tokens), model(tokens))
        x, cos, sin = torch.randn(2, 32, model.config.d_model), model.rope_cos[:32, None], model.rope_sin[:32, None]
        attention = model.layers[0].attention
        assert attention.training and torch.equal(attention(x, cos, sin), attention(x, cos, sin))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_around_attention_nothing_has_to_be_copied(kv_heads):
    """The heads of a token lie together, so a kernel whose output is laid out like its queries makes (batch, seq_len,
    d_model) as it is."""
    model = make_model(n_kv_heads=kv_heads)
    x = torch.randn(2, 32, model.config.d_model)
    for states in model.layers[0].attention.project(x, model.rope_cos[:32, None], model.rope_sin[:32, None]):
        assert states.stride()[1::2] == (model.config.head_dim, 1)  # of the heads, and of a head's dimensions


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "seq_len"), [(4, 4, 300), (4, 2, 128), (4, 1, 7)])
def test_attention_on_the_cpu_is_the_fused_kernels(heads, kv_heads, seq_len, masked):
    """Outputs and gradients, several blocks of queries, the last one short, shared keys and values, masked stories."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, n, seq_len, 16, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
    mask = story_mask(torch.randint(0, 20, (2, seq_len))) if masked else None
    ours = flash_attention(*inputs, mask)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=not masked, enable_gqa=True)
    weights = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    for own, other in zip(torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(theirs, inputs, weights),
                          strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


def test_too_long_an_input_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="context is 32"):
        model(random_tokens(model, 1, 33))


def test_the_memory_estimate_is_near_what_autograd_keeps():
    config = ModelConfig(vocab_size=2000, d_model=128, n_layers=6, n_heads=4, d_ffn=384, max_seq_len=256, dropout=0.1)
    model = Transformer(config)
    tokens = random_tokens(model, 8, 257)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(size for pointer, size in kept.items() if pointer not in weights)
    estimate = estimate_memory(model, 8, bf16=False) - 16 * count_parameters(model)
    assert 0.8 < estimate / activations < 1.4  # on the safe side: it holds the logits' gradient too
    model.gradient_checkpointing = True
    assert estimate_memory(model, 8, bf16=False) < 0.7 * estimate
