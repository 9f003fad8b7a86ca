"""Make the goldens: small dictionaries as other libraries save them, rows, and what those libraries make of the rows.

Run once, in an environment of its own; tests need none of these libraries:

    python3 -m venv build/peers/dictionaries
    build/peers/dictionaries/bin/pip install sae-lens==6.54.12
    build/peers/dictionaries/bin/pip install --no-deps eai-sparsify==1.3.3 dictionary-learning==0.1.0 natsort schedulefree
    build/peers/dictionaries/bin/python tests/data/dictionaries/make_goldens.py

Each folder holds a library's own files (dictionary_learning's state as safetensors instead of a pickle) and
`expected.safetensors`: `rows`, `codes` of the library's `encode`, dense, and `decoded`. A code as close to its threshold as
rounding moves it is no test: seeds are tried until float32 and float64 choose the same latents.
"""

import contextlib
import copy
import json
import shutil
import sys
import types
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
D_IN, D_OUT, N_LATENTS, K, N_ROWS = 12, 8, 40, 5, 10
HOOK = "blocks.3.hook_resid_post"


def main() -> None:
    for old in HERE.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    warnings.simplefilter("ignore")
    saelens()
    saelens_checkpoints()
    sparsify()
    dictionary_learning()
    nbytes = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    print(f"{nbytes / 1e3:.0f} kB in {len(list(HERE.glob('*/')))} folders")


def rows(seed: int) -> torch.Tensor:
    """Rows away from 0, with a dimension of large values, and of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N_ROWS, D_IN, generator=generator) * torch.linspace(0.5, 2, N_ROWS)[:, None] + 0.7
    x[:, 2] *= 10
    return x


def randomise(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.3 if parameter.ndim == 2 or name == "r_mag" else 0.5
            value = torch.randn(parameter.shape, generator=generator) * scale
            if name == "threshold":
                value = value.abs() * 2
            parameter.copy_(value)


def save_expected(folder: Path, x: torch.Tensor, codes: torch.Tensor, decoded: torch.Tensor) -> None:
    assert 0 < (codes > 0).sum() < codes.numel(), folder
    tensors = {"rows": x, "codes": codes, "decoded": decoded}
    save_file(
        {n: t.detach().float().contiguous() for n, t in tensors.items()}, folder / "expected.safetensors"
    )


def until_clear(name: str, make, encode) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a module and rows for which float32 and float64 choose the same latents."""
    for seed in range(50):
        module, x = make(), rows(seed)
        randomise(module, 1000 + seed)
        wide = copy.deepcopy(module).double()
        if hasattr(wide, "dtype") and not isinstance(type(wide).__dict__.get("dtype"), property):
            with contextlib.suppress(AttributeError):
                wide.dtype = torch.float64
        with torch.no_grad():
            if torch.equal(encode(module, x) > 0, encode(wide, x.double()) > 0):
                return module, x
    raise RuntimeError(name)


def saelens() -> None:
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class

    def case(
        name: str, architecture: str, *, hook: str = HOOK, heads: int = 0, metadata=None, **options
    ) -> None:
        cls, cfg_cls = get_sae_class(architecture)
        meta = {"hook_name": hook, "model_name": "tiny", "prepend_bos": True, **(metadata or {})}

        def make():
            from sae_lens.saes.sae import SAEMetadata

            return cls(cfg_cls(d_in=D_IN, d_sae=N_LATENTS, metadata=SAEMetadata(**meta), **options))

        def encode(sae, x):
            return sae.encode(x.unflatten(1, (heads, D_IN // heads)) if heads else x)

        sae, x = until_clear(name, make, encode)
        folder = HERE / name
        sae.save_model(folder)
        sae = SAE.load_from_disk(folder, dtype="float32")
        with torch.no_grad():
            codes = encode(sae, x)
            decoded = sae(x) if "transcoder" in architecture else sae.decode(codes)
        save_expected(folder, x, codes, decoded.flatten(1))

    case("saelens-standard", "standard")
    case("saelens-standard-plain", "standard", apply_b_dec_to_input=False)
    case("saelens-standard-bf16", "standard", dtype="bfloat16")
    case("saelens-standard-layer-norm", "standard", normalize_activations="layer_norm")
    case("saelens-standard-constant-norm", "standard", normalize_activations="constant_norm_rescale")
    case("saelens-standard-average", "standard", normalize_activations="expected_average_only_in")
    case(
        "saelens-standard-hook-z",
        "standard",
        hook="blocks.3.attn.hook_z",
        heads=3,
        reshape_activations="hook_z",
    )
    case("saelens-gated", "gated")
    case("saelens-gated-layer-norm", "gated", normalize_activations="layer_norm", apply_b_dec_to_input=False)
    case("saelens-topk", "topk", k=K)
    case(
        "saelens-topk-rescale",
        "topk",
        k=K,
        rescale_acts_by_decoder_norm=True,
        normalize_activations="layer_norm",
    )
    case("saelens-jumprelu", "jumprelu")
    case("saelens-jumprelu-constant-norm", "jumprelu", normalize_activations="constant_norm_rescale")
    out = {
        "apply_b_dec_to_input": False,
        "d_out": D_OUT,
        "metadata": {"hook_name_out": "blocks.3.hook_mlp_out"},
    }
    for architecture in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        options = dict(out)
        if architecture == "skip_transcoder":
            options["normalize_activations"] = "layer_norm"
        if "skip" in architecture:
            # SAELens adds what it makes of the row to the output, so both must be of one kind of width only here.
            options["d_out"] = D_OUT
        case(
            f"saelens-{architecture.replace('_', '-')}", architecture, hook="blocks.3.hook_mlp_in", **options
        )


def saelens_checkpoints() -> None:
    from sae_lens import SAE
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    def make():
        metadata = SAEMetadata(hook_name=HOOK, model_name="tiny")
        return BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=N_LATENTS, k=4.5, metadata=metadata)
        )

    # What is exported, and the training checkpoint that it comes from, are one dictionary with the same codes.
    for seed in range(50):
        sae, x = make(), rows(seed)
        randomise(sae, 2000 + seed)
        sae.topk_threshold.fill_(0.8)
        exported, checkpoint = HERE / "saelens-batchtopk-exported", HERE / "saelens-batchtopk-checkpoint"
        sae.save_model(checkpoint)
        copy.deepcopy(sae).save_inference_model(exported)
        loaded = SAE.load_from_disk(exported)
        with torch.no_grad():
            codes = loaded.encode(x)
            wide = copy.deepcopy(loaded).to(torch.float64)
            if torch.equal(codes > 0, wide.encode(x.double()) > 0):
                break
    decoded = loaded.decode(codes)
    for folder in (exported, checkpoint):
        save_expected(folder, x, codes, decoded)

    # A factor that is beside the weights, as in checkpoints: SAELens folds it into them.
    folder = HERE / "saelens-standard-scaler"
    shutil.copytree(HERE / "saelens-standard-average", folder)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}))
    sae, x = SAE.load_from_disk(folder), rows(3)
    sae.fold_activation_norm_scaling_factor(0.25)
    with torch.no_grad():
        codes = sae.encode(x)
        save_expected(folder, x, codes, sae.decode(codes))

    # Configurations from before version 6: flat, with other names.
    for name, source, changes in (
        (
            "saelens-old-standard",
            "saelens-standard",
            {"activation_fn_str": "relu", "normalize_activations": False},
        ),
        ("saelens-old-topk", "saelens-topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
    ):
        folder = HERE / name
        shutil.copytree(HERE / source, folder)
        cfg = {
            "hook_point": HOOK,
            "hook_point_layer": 3,
            "d_in": D_IN,
            "d_sae": N_LATENTS,
            "dtype": "torch.float32",
        }
        cfg |= {"model_name": "tiny", "device": "cpu", "hook_point_head_index": None, **changes}
        (folder / "cfg.json").write_text(json.dumps(cfg))
        sae, x = SAE.load_from_disk(folder), rows(5)
        with torch.no_grad():
            codes = sae.encode(x)
            save_expected(folder, x, codes, sae.decode(codes))


def sparsify() -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    def case(name: str, hook: str, **options) -> None:
        cfg = SparseCoderConfig(num_latents=N_LATENTS, k=K, **options)

        def make():
            return SparseCoder(D_IN, cfg)

        def dense(coder, x):
            found = coder.encode(x)
            return torch.zeros(len(x), N_LATENTS, dtype=x.dtype).scatter(1, found.top_indices, found.top_acts)

        coder, x = until_clear(name, make, dense)
        folder = HERE / name / hook
        coder.save_to_disk(folder)
        coder = SparseCoder.load_from_disk(folder)
        with torch.no_grad():
            found = coder.encode(x)
            decoded = coder.decode(found.top_acts, found.top_indices)
            if coder.W_skip is not None:
                decoded = decoded + x @ coder.W_skip.mT
            save_expected(folder, x, dense(coder, x), decoded)

    case("sparsify-topk", "layers.3", multi_topk=True)
    case("sparsify-groupmax", "layers.3.mlp", activation="groupmax")
    case("sparsify-transcode", "layers.3.mlp", transcode=True)
    case("sparsify-skip", "h.3.attn", transcode=True, skip_connection=True)


def dictionary_learning() -> None:
    # Only its training needs nnsight, in a version that other libraries here cannot live with.
    stub = types.ModuleType("nnsight")
    stub.LanguageModel = object
    sys.modules["nnsight"] = stub
    from dictionary_learning import dictionary as classes
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    def case(cls, *arguments, **trainer) -> None:
        def make():
            return cls(D_IN, N_LATENTS, *arguments)

        def encode(module, x):
            if hasattr(module, "threshold") and module.threshold.ndim == 0:
                module.threshold.fill_(0.4)
            return module.encode(x)

        module, x = until_clear(cls.__name__, make, encode)
        encode(module, x)
        folder = HERE / f"dictionary-learning-{cls.__name__}"
        folder.mkdir()
        state = {n: t.detach().clone().contiguous() for n, t in module.state_dict().items()}
        save_file(state, folder / "ae.safetensors")
        config = {"dict_class": cls.__name__, "activation_dim": D_IN, "dict_size": N_LATENTS, "layer": 3}
        config |= {"lm_name": "tiny", "submodule_name": "resid_post_layer_3", **trainer}
        (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"io": "out"}}))
        torch.save(state, folder / "ae.pt")
        loaded = cls.from_pretrained(str(folder / "ae.pt"))  # as its load_dictionary does
        (folder / "ae.pt").unlink()
        with torch.no_grad():
            codes = loaded.encode(x)
            save_expected(folder, x, codes, loaded.decode(codes))

    case(classes.AutoEncoder)
    case(classes.AutoEncoderNew)
    case(classes.GatedAutoEncoder)
    case(classes.JumpReluAutoEncoder)
    case(AutoEncoderTopK, K, k=K)
    case(BatchTopKSAE, K, k=K)
    case(MatryoshkaBatchTopKSAE, K, [N_LATENTS // 2, N_LATENTS // 2], k=K)


if __name__ == "__main__":
    main()
