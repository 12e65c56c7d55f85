"""jattn: attention research for JAX. Pure functions for every variant; names load on first use."""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULE_OF = {
    "dot_product_attention": "dot_product",
    "merge_attentions": "dot_product",
    "sliding_window_attention": "sparse.sliding_window",
    "block_sparse_attention": "sparse.block_sparse",
    "BlockMask": "sparse.block_mask",
    "create_block_mask": "sparse.block_mask",
    "pool_blocks": "sparse.selection",
    "select_topk": "sparse.selection",
    "select_topcdf": "sparse.selection",
    "sparge_selection": "sparse.selection",
    "block_topk_selection": "sparse.selection",
    "vertical_slash_selection": "sparse.selection",
    "nsa_selection": "sparse.selection",
    "moba_selection": "sparse.selection",
    "power_attention": "sparse.power",
    "power_attention_mask": "sparse.power",
    "receptive_hops": "sparse.power",
    "hyper_attention": "sparse.hyper",
    "angular_lsh_hash": "sparse.hyper",
    "routing_attention": "sparse.routing",
    "routing_step": "sparse.routing_decode",
    "init_routing_cache": "sparse.routing_decode",
    "KMeansState": "sparse.kmeans",
    "kmeans_init": "sparse.kmeans",
    "kmeans_init_lloyd": "sparse.kmeans",
    "kmeans_update": "sparse.kmeans",
    "kmeans_sums": "sparse.kmeans",
    "kmeans_apply": "sparse.kmeans",
    "pyramid_sparse_attention": "sparse.psa",
    "psa_attention": "sparse.psa",
    "build_pyramid": "sparse.psa",
    "psa_importance_sampling": "sparse.psa_importance",
    "psa_importance_antidiagonal": "sparse.psa_importance",
    "psa_similarity": "sparse.psa_importance",
    "psa_levels": "sparse.psa_levels",
    "psa_similarity_cap": "sparse.psa_levels",
    "psa_density": "sparse.psa_levels",
    "gilbert_order": "sparse.gilbert",
    "kronecker_attention": "sparse.kronecker",
    "kronecker_attention_poly": "sparse.kronecker_poly",
    "khatri_rao": "sparse.kronecker_poly",
    "poly_degree": "sparse.kronecker_poly",
    "pka_attention": "sparse.pka",
    "position_aligned_attention": "sparse.pka",
    "keyword_mask": "sparse.pka",
    "keyword_scoped_attention": "sparse.pka",
    "neighborhood_attention": "neighborhood.neighborhood",
    "na1d": "neighborhood.neighborhood",
    "na2d": "neighborhood.neighborhood",
    "na3d": "neighborhood.neighborhood",
    "na_qk": "neighborhood.unfused",
    "na_av": "neighborhood.unfused",
    "Neighborhood": "neighborhood.window",
    "window_bounds": "neighborhood.window",
    "inverse_window_bounds": "neighborhood.window",
    "token_permute": "neighborhood.permute",
    "token_unpermute": "neighborhood.permute",
    "tile_plan": "neighborhood.tiles",
    "tile_stats": "neighborhood.tiles",
    "neighborhood_attention_step": "neighborhood.step",
    "linear_attention": "linear.recurrence",
    "linear_attention_step": "linear.recurrence",
    "LinearState": "linear.arguments",
    "lightning_attention": "linear.lightning",
    "lightning_attention_step": "linear.lightning",
    "lightning_slopes": "linear.lightning",
    "retention": "linear.retention",
    "retention_step": "linear.retention",
    "retention_gamma": "linear.retention",
    "simple_gla": "linear.gated",
    "simple_gla_step": "linear.gated",
    "delta_rule": "linear.delta_rule",
    "delta_rule_step": "linear.delta_rule",
    "gated_delta_rule": "linear.gated",
    "kda": "linear.gated",
    "hedgehog_attention": "linear.hedgehog",
    "hedgehog_attention_step": "linear.hedgehog",
    "hedgehog_feature_map": "linear.hedgehog",
    "attention_distillation_loss": "linear.distillation",
    "sea_attention": "linear.sea",
    "sea_continue": "linear.sea_decode",
    "sea_step": "linear.sea_decode",
    "sea_distillation_loss": "linear.sea_loss",
    "init_sea_params": "linear.sea_params",
    "init_sea_state": "linear.sea_decode",
    "attend_varlen": "linear.varlen",
    "selective_scan": "linear.selective_scan",
    "selective_scan_step": "linear.selective_scan",
    "DSFSystem": "linear.dsf",
    "dsf_eigenvalues": "linear.dsf",
    "dsf_materialize": "linear.dsf",
    "dsf_scan": "linear.dsf",
    "large_kernel_attention": "vision.large_kernel",
    "ela": "vision.efficient_local",
    "apply_rotary": "positions",
    "apply_rotary_axes": "positions",
    "as_attention_fn": "adapters",
    "explain": "dispatch",
    "CATALOG": "catalog",
    "Entry": "catalog",
}
_SUBMODULES = (
    "adapters", "catalog", "checks", "dispatch", "dot_product", "linear", "masks", "models", "neighborhood", "nn",
    "positions", "sharding", "sparse", "vision",
)  # fmt: skip

__all__ = sorted((*_MODULE_OF, *_SUBMODULES))  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"jattn.{_MODULE_OF[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"jattn.{name}")
    else:
        raise AttributeError(f"module 'jattn' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
