"""jax's own attention kernels, to hold the figures of other kernels against: the same meter, known kernels.

Causal, 8 heads of T = 4096, H = 128, bf16. On TPU splash attention, named `block_q x block_kv / block_kv_compute` and
with its fused backward pass; on H100 the Triton kernel with its default blocks. A gradient is q, k, v -> o, then
q, k, v, o, do -> dq, dk, dv: 12 arrays that must be moved, where a forward pass has 4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.lab.cases import Case

HEADS, LENGTH, WIDTH = 8, 4096, 128
_ARRAY_BYTES = 2 * HEADS * LENGTH * WIDTH


def cases(target: str) -> dict[str, Case]:
    if target == "h100":
        return _both("triton", _triton, (1, LENGTH, HEADS, WIDTH))
    shape = (HEADS, LENGTH, WIDTH)
    return _both("512", _splash(512, 512, 512), shape) | _both("512x2048/512", _splash(512, 2048, 512), shape)


def _both(name, attention, shape):
    def loss(query, key, value):
        return attention(query, key, value).astype(jnp.float32).sum()

    arrays = (jax.ShapeDtypeStruct(shape, jnp.bfloat16),) * 3
    return {
        f"forward {name}": Case(attention, arrays, 4 * _ARRAY_BYTES),
        f"gradient {name}": Case(jax.grad(loss, argnums=(0, 1, 2)), arrays, 12 * _ARRAY_BYTES),
    }


def _splash(q, kv, compute):
    def attention(query, key, value):
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        blocks = splash.BlockSizes(
            block_q=q,
            block_kv=kv,
            block_kv_compute=compute,
            block_q_dkv=q,
            block_kv_dkv=kv,
            block_kv_dkv_compute=compute,
            use_fused_bwd_kernel=True,
        )
        mask = masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))] * HEADS)
        return splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)(query, key, value)

    return attention


def _triton(query, key, value):
    from jax.experimental.pallas.ops.gpu.attention import mha

    return mha(query, key, value, segment_ids=None, sm_scale=WIDTH**-0.5, causal=True)
