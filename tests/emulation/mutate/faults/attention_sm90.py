"""In the Hopper attention forward: waits, fences, barriers, fragments, descriptors."""

from __future__ import annotations

from tests.emulation.mutate.faults.fault import Planted

FORWARD, SM90 = "csrc/attention/cuda_sm90.cu", "csrc/common/sm90.cuh"

PLANTED = (
    # Waits and barriers.
    Planted(FORWARD, "barrier_wait(tiles.key_empty[stage], (t / kStages + 1) % 2);", ""),
    Planted(FORWARD, "barrier_wait(tiles.value_empty[stage], ((t - 1) / kStages + 1) % 2);", ""),
    Planted(FORWARD, "(tiles.key_full[t % kStages], t / kStages % 2)", "(tiles.key_full[t % kStages], 0)"),
    Planted(FORWARD, "barrier_wait(tiles.value_full[t % kStages], t / kStages % 2);", ""),
    Planted(FORWARD, "barrier_wait(tiles.query_full, 0);", ""),
    Planted(FORWARD, "wgmma_wait<1>(scores);", ""),
    Planted(FORWARD, "wgmma_wait<1>(scores);", "wgmma_wait<2>(scores);"),
    Planted(FORWARD, "wgmma_wait<0>(output);\n      keep(weights);", "keep(weights);"),
    Planted(FORWARD, "issue_scores(0);\n    wgmma_wait<0>(scores);", "issue_scores(0);"),
    Planted(FORWARD, "release(tiles.value_empty[(t - 1) % kStages]);", "release(tiles.value_empty[t % kStages]);"),
    Planted(FORWARD,
            "      wgmma_wait<0>(output);\n      keep(weights);\n      release(tiles.value_empty[(t - 1) % kStages]);",
            "      release(tiles.value_empty[(t - 1) % kStages]);\n      wgmma_wait<0>(output);\n      keep(weights);"),
    Planted(FORWARD, "async_fence();\n    named_sync(kBoth, kThreads);", "named_sync(kBoth, kThreads);"),
    Planted(FORWARD, "async_fence();\n    named_sync(kBoth, kThreads);", "async_fence();"),
    Planted(FORWARD, "async_fence();\n    named_sync(kOwn + which", "named_sync(kOwn + which"),
    Planted(FORWARD, "async_fence();\n    named_sync(kOwn + which, kWarpgroup);", "async_fence();"),
    Planted(FORWARD, "tensor_store_wait();", ""),
    Planted(FORWARD, "kConsumers * 4), barrier_init(tiles.value_empty", "4), barrier_init(tiles.value_empty"),
    Planted(FORWARD, "barrier_init_fence();\n  }\n  __syncthreads();", "barrier_init_fence();\n  }"),
    Planted(FORWARD, "if (thread % 32 == 0) barrier_arrive(barrier);", "if (thread == 0) barrier_arrive(barrier);"),
    # Fragments, descriptors, stages.
    Planted(FORWARD, "weights[4 * i], weights[4 * i + 1],", "weights[4 * i + 1], weights[4 * i],"),
    Planted(FORWARD, "4 * i + 1], weights[4 * i + 2]", "4 * i + 2], weights[4 * i + 1]"),
    Planted(FORWARD, "part * kKeys * kSpan + inside", "part * kRows * kSpan + inside"),
    Planted(FORWARD, "tiles.value[t % kStages][0], kKeys * kSpan)", "tiles.value[t % kStages][0])"),
    Planted(FORWARD, "descriptor(tiles.query[which][0])", "descriptor(tiles.query[0][0])"),
    Planted(FORWARD, "if (block.masked(t)) mask(t);", ""),
    Planted(FORWARD, "output[i] *= shrink[i / 2 % 2];", "output[i] *= shrink[i % 2];"),
    Planted(FORWARD, "block.h / w.group", "block.h"),
    Planted(SM90, "(chunk ^ row % 8) * 16", "chunk * 16"),
    Planted(SM90, "fence.mbarrier_init.release.cluster;", ""),
    Planted(FORWARD, "registers_give<kProducerRegisters>();", ""),
    Planted(FORWARD, "registers_give<kProducerRegisters>();",
            "if (threadIdx.x % 32 == 0) registers_give<kProducerRegisters>();"),
    Planted(FORWARD, "registers_take<kConsumerRegisters>();", "registers_take<256>();"),
    Planted(SM90, "fence.proxy.async.shared::cta;", ""),
    Planted(SM90, "wgmma.fence.sync.aligned;", ""),
    Planted(SM90, "wgmma.commit_group.sync.aligned;", ""),
)  # fmt: skip
