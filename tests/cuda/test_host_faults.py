"""Faults planted in the tiers' own sources: each must be noticed, by a finding of the host build or by a wrong number.

A faulty copy is a tier's text with one place changed, in a namespace of its own and cut down to one cell and one
product, so that all of them fit one library and build in a minute.
"""

import ctypes
import re
import shutil
from typing import NamedTuple

import pytest
import torch

from tests.accuracy import errors
from tests.cuda.test_host import TIERS, Cuda, Problem, backward_call, forward_call, same_problem
from tests.hostbuild.build import HERE, OUT, ROOT, build, replace_text
from tests.kernels.test_kernels import Case

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


class Fault(NamedTuple):
    tier: str
    which: str  # forward or backward
    product: str  # ffma or half
    text: str  # what stands in the tier's source, once
    instead: str
    says: str | None  # what a finding says; "": nothing is wrong; None: only numbers tell
    launches: int = 1  # over one workspace, zeroed before the first
    flags: bool = False  # grid: results beside flags, or words with tags
    in_place: bool = False  # gates, or their gradients, in the memory of saved
    alone: bool = False  # cluster: of one block
    infinite: bool = False  # a reset makes the last unit's state infinite, which even weights of 0 do not hide


def grid(*rest, launches=1):
    return Fault("grid", *rest, launches)


def flags(*rest, launches=1):
    return Fault("grid", *rest, launches, True)


def cluster(*rest, launches=1):
    return Fault("cluster", *rest, launches)


def alone(*rest):
    return Fault("cluster", *rest, alone=True)


def resident(*rest):
    return Fault("resident", *rest)


def step(which, product, text, instead, says=None):
    return Fault("step", which, product, text, instead, says)


def in_place(tier, *rest):
    return Fault(tier, *rest, in_place=True)


def infinite(*rest):
    return Fault("grid", *rest, infinite=True)


# Loads of a unit that read its neighbour, too, and have no use for it.
GATES, SAVED = "there ? gates[g * p.hidden] :", "out[i] = saved[i * p.hidden];"
GATES_OF_TWO = "there ? gates[g * p.hidden] + 0 * gates[g * p.hidden - (j > 0)] :"
GRID_SAVED = "load_words<S, N>(saved.at, int(p.hidden)"
GRID_SAVED_OF_TWO = "load_words<S, N>(saved.at - (unit > 0), int(p.hidden)"
SAVED_OF_TWO = "out[i] = saved[i * p.hidden] + 0 * saved[i * p.hidden - (j > 0)];"
GRID_BARRIER = "dev::sync_block();\n    const bool own ="
CLEARED = "tagged_words[i] = s.unit_of_word(int(i % s.words())) < s.hidden ? 0 : kNoUnit;"
AWAIT = "exchange.await(k, tag, flags.begin, flags.end - flags.begin);"
OF_LANE = " + range.begin * kTileWords + lane"
BUFFER = "return base + (k & 1 ? even + odd : even);"
EXPECT = "if (arrives) dev::mbarrier_arrive_expect(barrier, bytes);"
ALONE = "dev::sync_block();\n    } else if (wanted) {"
BACKWARD_BARRIER = "before, sums);\n    dev::sync_block();"
FAULTS = {
    "grid_ffma": grid("forward", "ffma", "", "", ""),
    "grid_half": grid("forward", "half", "", "", ""),
    "grid_backward": grid("backward", "ffma", "", "", ""),
    "grid_two_launches": grid("forward", "half", "", "", "", launches=2),
    "no_barrier": grid(
        "forward", "ffma", GRID_BARRIER, GRID_BARRIER.replace("dev::sync_block();", ""), "race|uninitialised"),
    "no_barrier_backward": grid("backward", "ffma", BACKWARD_BARRIER, "before, sums);", "race|uninitialised"),
    "no_barrier_in_sort": grid(
        "forward", "half", "= length_of(p, group, b);\n  dev::sync_block();", "= length_of(p, group, b);",
        "race|uninitialised"),
    "one_sums_buffer": grid("forward", "half", "k & 1 ? shared.sums_odd :", "", "race"),
    "no_warp_barrier_after_stage": grid(
        "forward", "ffma", "dev::sync_warp();\n      const float4* w", "const float4* w", "race|uninitialised"),
    "no_warp_barrier_before_stage": grid(
        "forward", "ffma", "dev::sync_warp();  // before the stage", "// before", "race"),
    "rows_not_sorted": grid("forward", "half", "if (p.lengths) {", "if (false) {", None),
    "tiles_that_are_not_awaited": grid(
        "forward", "half", "from + t * kTileWords, tiles - t,", "from + t * kTileWords, kAhead,",
        "deadlock|out of bounds"),
    # words
    "one_word_buffer": grid("forward", "half", BUFFER, "return base + even;", None),
    "one_word_buffer_backward": grid("backward", "ffma", BUFFER, "return base + even;", None),
    "tag_ignored": grid("forward", "half", "if (seen == tag) break;", "break;", None),
    "tag_of_one_word_for_two": grid(
        "forward", "half", "for (int i = 0; i < 2; ++i) tag =", "for (int i = 0; i < 1; ++i) tag =", None),
    "words_not_cleared": grid("forward", "ffma", CLEARED, ";", "uninitialised"),
    "words_of_last_launch": grid("forward", "half", CLEARED, ";", None, launches=2),
    "units_that_are_not_awaited": grid("forward", "half", "? 0 : kNoUnit;", "? 0 : 0;", "deadlock"),
    "units_that_are_not_awaited_ffma": grid("backward", "ffma", "? 0 : kNoUnit;", "? 0 : 0;", "deadlock"),
    "published_to_wrong_buffer": grid(
        "forward", "half", "store(k + 1, uint32_t(k) + 2", "store(k, uint32_t(k) + 2", "deadlock"),
    "published_before_its_value": grid(
        "forward", "half", "else dev::store_relaxed(words(k) + own + gate * kTileWords, tagged(tag, value));",
        "else dev::store_relaxed(words(k) + own + gate * kTileWords, tagged(tag, 0)), "
        "dev::store_relaxed(words(k) + own + gate * kTileWords, tagged(tag, value));", None),
    "row_not_published": grid(
        "forward", "half", "if (o.row.running(k + 1)) exchange", "if (o.position) exchange", "deadlock"),
    "new_rows_awaited": grid(
        "backward", "ffma", "uint32_t(steps - k) - 1, before", "uint32_t(steps - k) - 1, running", "deadlock"),
    "rows_that_do_not_run_awaited": grid(
        "forward", "half", "(row + lane / 4 < rows ? lane / 4 : rows - 1 - row)", "(lane / 4)", "deadlock"),
    "rows_that_do_not_run_awaited_ffma": grid(
        "forward", "ffma", "(2 * i + half < left ? 2 * i + half : left - 1)", "(2 * i + half)", "deadlock"),
    "tag_of_next_step": grid(
        "backward", "ffma", "uint32_t(steps - k) - 1, before", "uint32_t(steps - k), before", "deadlock"),
    "tag_of_last_step": grid(
        "backward", "ffma", "uint32_t(steps - k) - 1, before", "uint32_t(steps - k) - 2, before", None),
    "words_of_wrong_buffer": grid(
        "forward", "half", f"exchange.words(k){OF_LANE}", f"exchange.words(k + 1){OF_LANE}", "deadlock"),
    # flags
    "flags_half": flags("forward", "half", "", "", ""),
    "flags_ffma": flags("forward", "ffma", "", "", ""),
    "flags_backward": flags("backward", "ffma", "", "", ""),
    "flags_two_launches": flags("forward", "half", "", "", "", launches=2),
    "flag_relaxed_load": flags("forward", "half", "dev::load_acquire(", "dev::load_relaxed(", "race"),
    "flag_relaxed_store": flags("forward", "half", "dev::store_release(", "dev::store_relaxed(", "race"),
    "flag_before_other_lanes": flags(
        "backward", "ffma", "dev::sync_warp();\n    if constexpr (kFlags) {", "if constexpr (kFlags) {", "race"),
    "flag_seen_by_one_lane": flags(
        "forward", "half", "tag) pause(turn);\n      dev::sync_warp();", "tag) pause(turn);", "race"),
    "flag_not_awaited": flags(
        "forward", "half", f"{AWAIT}\n    const Word* words = exchange.words(k){OF_LANE}",
        f"const Word* words = exchange.words(k){OF_LANE}", "race"),
    "flag_of_last_block_not_awaited": flags(
        "forward", "ffma", "(last / s.units + 1) * s.owner_warps()", "(last / s.units) * s.owner_warps()", "race"),
    "flag_of_last_warp_not_awaited": flags(
        "backward", "ffma", "(last / s.units + 1) * s.owner_warps()", "(last / s.units + 1) * s.owner_warps() - 1",
        "race"),
    "flag_of_last_warp_not_set": flags(
        "forward", "ffma", "warp < s.owner_warps()", "warp < s.owner_warps() - 1", "deadlock"),
    "flag_of_last_step": flags(
        "backward", "ffma", "uint32_t(steps - k) - 1, before", "uint32_t(steps - k) - 2, before", "race"),
    "flag_set_too_early": flags(
        "forward", "half", "exchange.publish(k + 1, uint32_t(k) + 2,", "exchange.publish(k + 1, uint32_t(k) + 3,",
        "race"),
    "flags_of_last_launch": flags("forward", "half", "results[i] = 0;", ";", "race", launches=2),
    "flags_not_cleared": flags("backward", "ffma", "results[i] = 0;", ";", "uninitialised"),
    "one_buffer_of_results": flags("forward", "half", BUFFER, "return base + even;", "race"),
    "flag_before_results": flags(
        "forward", "half", "const bool own =", "exchange.publish(k + 1, uint32_t(k) + 2, true);\n    const bool own =",
        "race"),
    "results_in_wrong_buffer": flags(
        "forward", "half", "store(k + 1, uint32_t(k) + 2", "store(k, uint32_t(k) + 2", "race"),
    "no_barrier_with_flags": flags(
        "forward", "half", GRID_BARRIER, GRID_BARRIER.replace("dev::sync_block();", ""), "race|uninitialised"),
    # debug builds: a wait that ends does so unharmed, one that does not ends the launch
    "bounded_spins": grid("forward", "half", "kMostTurns = 0;", "kMostTurns = 1 << 24;", ""),
    "bounded_spins_that_run_out": grid("forward", "half", "kMostTurns = 0;", "kMostTurns = 1;", ": trap"),
    "grid_sums_too_short": grid(
        "forward", "half", "sums_odd = carver.take<float>(size_t(s.sums_floats()));",
        "sums_odd = carver.take<float>(size_t(s.sums_floats()) / 2);", "out of bounds"),
    "grid_weights_too_short": grid(
        "backward", "ffma", "carver.take<uint4>(size_t(s.weight_quads()))",
        "carver.take<uint4>(size_t(s.weight_quads()) - 1)", "out of bounds"),
    "grid_tail_of_weights": grid("forward", "ffma", "unit < s.hidden && x.k_unit < s.hidden;", "unit < s.hidden;",
                                 "out of bounds"),
    "infinite_half": infinite("forward", "half", "", "", ""),
    "half_a_word_not_cleared": infinite(
        "forward", "half", "n < o.units ? next_h<S>(p, o.row, unit(n), out[n].state[0], reset_next) : 0.f;",
        "next_h<S>(p, o.row, unit(n), out[n].state[0], reset_next);", None),
    "grid_padding_left": grid("forward", "half", "if (n < o.units) pad_forward", "if (false) pad_forward", None),
    "grid_backward_padding_left": grid(
        "backward", "ffma", "if (n < o.units) pad_backward", "if (false) pad_backward", None),
    "grid_sums_not_cleared": grid(
        "backward", "half", "if (n < o.units) clear_sums", "if (false) clear_sums", "uninitialised"),

    # pushes
    "cluster_half": cluster("forward", "half", "", "", ""),
    "cluster_ffma": cluster("forward", "ffma", "", "", ""),
    "cluster_backward_half": cluster("backward", "half", "", "", ""),
    "cluster_backward_ffma": cluster("backward", "ffma", "", "", ""),
    "cluster_two_launches": cluster("forward", "half", "", "", "", launches=2),
    "phase_of_other_parity": cluster("forward", "half", "(tag - 1) / 2 % 2", "(tag + 1) / 2 % 2", "race"),
    "phase_parity_of_step": cluster("backward", "ffma", "(tag - 1) / 2 % 2", "(tag - 1) % 2", "race|deadlock"),
    "bytes_not_expected": cluster("forward", "half", EXPECT, "", "deadlock"),
    "bytes_expected_twice": cluster("forward", "half", "arrives = dev::keep(tid == 0 ? 1 : 0);",
                                    "arrives = dev::keep(tid <= 1 ? 1 : 0);", "arrivals|deadlock"),
    "too_few_bytes_expected": cluster(
        "forward", "half", "bytes(unsigned(s.pushed_bytes()))", "bytes(unsigned(s.pushed_bytes()) - 16)",
        "race|deadlock"),
    "too_many_bytes_expected": cluster(
        "backward", "ffma", "bytes(unsigned(s.pushed_bytes()))", "bytes(unsigned(s.pushed_bytes()) + 16)", "deadlock"),
    "bytes_of_rows_that_do_not_run": cluster(
        "forward", "half", "if (n < pushes) push(n);", "if (n < pushes && four.x) push(n);", "deadlock"),
    "phase_not_awaited": cluster("forward", "half", "dev::mbarrier_wait(barrier_of(k), parity);", "", "race"),
    "phase_awaited_by_one_lane": cluster(
        "forward", "half", "dev::mbarrier_wait(barrier_of(k), parity);",
        "if (threadIdx.x % 32 == 0) dev::mbarrier_wait(barrier_of(k), parity);", "race"),
    "one_pushed_buffer": cluster("forward", "half", "return k & 1 ? odd : even;", "return even;", "race"),
    "one_pushed_buffer_backward": cluster("backward", "ffma", "return k & 1 ? odd : even;", "return even;", "race"),
    "one_barrier_for_both_buffers": cluster(
        "forward", "ffma", "return k & 1 ? barrier_odd : barrier_even;", "return barrier_even;",
        "deadlock|race|arrivals"),
    "pushed_before_others_have_read": cluster(
        "forward", "half", GRID_BARRIER, GRID_BARRIER.replace("dev::sync_block();", ""), "race|uninitialised"),
    "pushed_before_others_have_read_backward": cluster(
        "backward", "ffma", BACKWARD_BARRIER, "before, sums);", "race|uninitialised"),
    "pushed_in_last_step": cluster(
        "forward", "half", "uint32_t(k) + 2, k + 1 < steps);", "uint32_t(k) + 2, true);",
        "which has ended|beyond its count|below its count"),
    "last_block_not_pushed_to": cluster(
        "forward", "half", "ceil_div(blocks - in_four, 4)", "ceil_div(blocks - 1 - in_four, 4)", "deadlock"),
    "words_in_other_order": cluster(
        "forward", "half", "low(s.mma ? 4 : 1), high(s.mma ? 1 : 2)", "low(1), high(2)", "race"),
    "pair_of_four_swapped": cluster(
        "forward", "ffma", "a = second ? other : own, b = second ? own : other;", "a = own, b = other;", None),
    "pushed_to_wrong_buffer": cluster(
        "forward", "half", "words(k) + first + g * kTileWords", "words(k + 1) + first + g * kTileWords", "race"),
    "pushed_beside_its_place": cluster("forward", "half", "first(word / 4 * 4)", "first(word)", "align"),
    "buffers_not_cleared": cluster("forward", "ffma", "even[i] = odd[i] = 0;", ";", "uninitialised"),
    "no_fence_after_init": cluster("forward", "half", "dev::mbarrier_init_fence();", "", "without mbarrier_init_fence"),
    "no_barrier_of_the_cluster": cluster(
        "forward", "half", "dev::sync_cluster();", "dev::sync_block();",
        "before its mbarrier's init|without mbarrier_init"),
    "tile_of_units_with_anothers_sums": cluster(
        "forward", "ffma", "(tile * s.padded_rows() + position)", "((tile ^ 1) * s.padded_rows() + position)",
        None),
    "weights_of_another_tile": cluster("forward", "ffma", "x.m_unit += unit_tile * s.most_units();", "", None),
    "cluster_tail_of_weights": cluster(
        "backward", "ffma", "x.m_unit < s.units && unit < s.hidden &&", "x.m_unit < s.units &&", "out of bounds"),
    "cluster_sums_too_short": cluster(
        "forward", "ffma", "sums_odd = carver.take<float>(size_t(s.sums_floats()));",
        "sums_odd = carver.take<float>(size_t(s.sums_floats()) / 2);", "out of bounds"),
    "masks_left_out": cluster(
        "forward", "half", "p.lengths || p.resets ? f(cell", "false ? f(cell", "race|out of bounds"),
    "alone_half": alone("forward", "half", "", "", ""),
    "alone_ffma": alone("forward", "ffma", "", "", ""),
    "alone_backward_half": alone("backward", "half", "", "", ""),
    "alone_backward_ffma": alone("backward", "ffma", "", "", ""),
    "alone_no_barrier": alone("forward", "half", ALONE, "} else if (wanted) {", "race"),
    "alone_no_barrier_backward": alone("backward", "ffma", ALONE, "} else if (wanted) {", "race"),
    "alone_in_wrong_buffer": alone(
        "forward", "half", "words(k)[first + own + g", "words(k + 1)[first + own + g", None),
    "alone_in_wrong_buffer_backward": alone(
        "backward", "ffma", "words(k)[first + own + g", "words(k + 1)[first + own + g", None),
    "cluster_bounded_spins_that_run_out": cluster("forward", "half", "kMostTurns = 0;", "kMostTurns = 1;", ": trap"),

    "resident_ffma": resident("forward", "ffma", "", "", ""),
    "resident_half": resident("forward", "half", "", "", ""),
    "resident_backward_ffma": resident("backward", "ffma", "", "", ""),
    "resident_backward_half": resident("backward", "half", "", "", ""),
    "resident_no_barrier": resident(
        "forward", "ffma", "reset_next = reset_before(p, r, k + 2);\n    dev::sync_block();",
        "reset_next = reset_before(p, r, k + 2);", "race|uninitialised"),
    "resident_no_barrier_half": resident(
        "forward", "half", "reset_before(p, r[c], k + 2);\n    }\n    dev::sync_block();",
        "reset_before(p, r[c], k + 2);\n    }", "race|uninitialised"),
    "resident_one_buffer": resident(
        "forward", "ffma", "float* h_next = k % 2 ? s.even : s.odd;", "float* h_next = const_cast<float*>(h_prev);",
        "race"),
    "resident_wrong_parity": resident(
        "forward", "ffma", "s.even[row * s.stride + j] = start;", "s.odd[row * s.stride + j] = start;", None),
    "resident_shared_too_short": resident(
        "forward", "ffma", "odd = carver.take<float>(size_t(kRows) * stride);",
        "odd = carver.take<float>(size_t(kRows) * stride - 1);", "out of bounds: write"),
    "resident_not_cleared": resident(
        "forward", "ffma", "clear_shared(s.even, kRows * s.stride);", "", "uninitialised"),
    "resident_units_that_are_not": resident(
        "forward", "ffma", "if (j >= h || (kRows == 1 && lane > 0)) r.length = -1;", "", "race|out of bounds"),
    "resident_units_that_are_not_half": resident(
        "forward", "half", "if (r[c].running(k) && j + 8 * u < h)", "if (r[c].running(k))", "race|out of bounds"),
    "resident_tail_of_weights": resident("forward", "ffma", "j < h && term < h ? weight", "j < h ? weight",
                                         "out of bounds: read"),
    "resident_fragment_swapped": resident(
        "forward", "half", "x += lane / 4 * stride + lane % 4;", "x += lane % 8 * stride + lane / 8;", None),
    "resident_backward_no_barrier": resident(
        "backward", "ffma", "// in flight during the next product\n    }\n    dev::sync_block();", "\n    }",
        "race|uninitialised"),
    "resident_backward_no_barrier_half": resident(
        "backward", "half", "loads[c][u]);\n      }\n    }\n    dev::sync_block();", "loads[c][u]);\n      }\n    }",
        "race|uninitialised"),
    "resident_backward_one_buffer": resident(
        "backward", "ffma", "float* to = k % 2 == 0 ? s.even : s.odd;", "float* to = const_cast<float*>(from);",
        "race"),
    "resident_backward_not_cleared": resident(
        "backward", "half", "clear_shared(s.odd, kMmaRows * s.stride);", "", "uninitialised"),
    "resident_backward_reset_late": resident(
        "backward", "ffma", "resets.step_to(p, r, k - 1);", "resets.step_to(p, r, k);", None),
    "resident_backward_two_owners": resident(
        "backward", "ffma", "if (j >= h || (kRows == 1 && lane % kColumns > 0)) r.length = -1;", "",
        "race|out of bounds"),
    "resident_padding_left": resident(
        "forward", "ffma", "if (r.present()) pad_forward", "if (false) pad_forward", None),
    "resident_padding_left_half": resident(
        "forward", "half", "j + 8 * u < h) pad_forward", "false) pad_forward", None),
    "resident_backward_padding_left": resident(
        "backward", "ffma", "if (r.present()) pad_backward", "if (false) pad_backward", None),
    "resident_backward_padding_left_half": resident(
        "backward", "half", "j + 8 * u < h) pad_backward", "false) pad_backward", None),
    "resident_sums_not_cleared": resident(
        "backward", "ffma", "if (r.present()) clear_sums", "if (false) clear_sums", "uninitialised"),
    "resident_sums_not_cleared_half": resident(
        "backward", "half", "j + 8 * u < h) clear_sums", "false) clear_sums", "uninitialised"),

    "step_forward": step("forward", "ffma", "", "", ""),
    "step_backward": step("backward", "ffma", "", "", ""),
    "step_units_that_are_not": step(
        "forward", "ffma", "if (j >= p.hidden) return;\n    if (!r.running(k)) return step_forward_padding",
        "if (!r.running(k)) return step_forward_padding", "race|out of bounds"),
    "step_past_a_row's_end": step(
        "forward", "ffma", "if (!r.running(k)) return step_forward_padding",
        "if (!r.present()) return step_forward_padding", "race|out of bounds"),
    "step_padding_left": step(
        "forward", "ffma", "return step_forward_padding<Cell, S>(p, r, k, j);\n    ForwardIn",
        "return;\n    ForwardIn"),
    "step_backward_padding_left": step(
        "backward", "ffma", "if (!r.running(k)) pad_grad_gates<Cell, S>(p, r, k, j);", ""),
    "step_sums_not_cleared": step("backward", "ffma", "if (k + 1 == p.steps) {", "if (false) {", "uninitialised"),
    "step_buffers_transposed": step(
        "forward", "ffma", "(r.group * p.batch + r.row) * n + j", "(r.row * p.batch + r.group) * n + j",
        "race|out of bounds"),
    "step_reset_late": step("forward", "ffma", "const bool reset_next = reset_before(p, r, k + 1);",
                            "const bool reset_next = reset_before(p, r, k);"),
    "step_carries_what_nobody_wrote": step(
        "backward", "ffma", "b.carried, j, !r.last(k));", "b.carried, j);", "uninitialised"),
    "step_product_that_was_not": step(
        "backward", "ffma", "const V recurrent = r.last(k) ? V(0) : handed_on", "const V recurrent = handed_on",
        "uninitialised"),

    # gates, and their gradients, in the memory of saved
    "step_in_place": in_place("step", "forward", "ffma", "", "", ""),
    "grid_in_place": in_place("grid", "backward", "ffma", "", "", ""),
    "gates_of_another_thread": in_place("step", "forward", "ffma", GATES, GATES_OF_TWO, "race"),
    "values_of_another_thread": in_place("step", "backward", "ffma", SAVED, SAVED_OF_TWO, "race"),
    "values_of_another_block": in_place("grid", "backward", "ffma", GRID_SAVED, GRID_SAVED_OF_TWO, "race"),
    "values_of_another_block_of_a_cluster": in_place(
        "cluster", "backward", "ffma", GRID_SAVED, GRID_SAVED_OF_TWO, "race"),
    "gradients_one_behind_the_other": in_place(
        "resident", "backward", "ffma", "place * p.grad_gates_stride", "place * G * p.hidden", "race|read-only"),

    # what all tiers share
    "reset_gradient_overwritten": step("backward", "ffma", "[at] += later;", "[at] = later;"),
    "reset_of_another_step": step("forward", "ffma", "r.time(k) + (r.reverse ? 1 : 0)", "r.time(k)"),
    "state_of_another_step": step("backward", "ffma", "(r.reverse ? 1 : -1) * p.batch", "-1 * p.batch",
                                  "out of bounds|uninitialised"),
    "final_state_of_another_step": step("forward", "ffma", "return k + 1 == length;", "return k + 2 == length;"),
}  # fmt: skip

FILES = {
    "grid": (
        "common.cuh",
        "exchange.cuh",
        "grid.cuh",
        "grid_product.cuh",
        "grid_prepare.cu",
        "unit_{}.cuh",
        "grid_{}.cuh",
        "grid_{}.cu",
    ),
    "cluster": (
        "common.cuh",
        "exchange.cuh",
        "grid.cuh",
        "grid_product.cuh",
        "cluster.cuh",
        "grid_prepare.cu",
        "unit_{}.cuh",
        "grid_{}.cuh",
        "cluster_{}.cu",
    ),
    "resident": ("common.cuh", "unit_forward.cuh", "unit_backward.cuh", "resident.cuh", "resident_{}.cu"),
    "step": ("common.cuh", "step.cuh", "unit_{}.cuh", "step_{}.cu"),
}
CALLS = {
    "grid": "grid_WHICH(p, unpack_choice(choice), workspace, nullptr)",
    "cluster": "cluster_WHICH(p, unpack_choice(choice), workspace, nullptr)",
    "resident": "resident_WHICH(p, unpack_choice(choice), nullptr)",
}
WHOLE_LAUNCHER = """
FASTRNN_EXPORT int run_NAME(const int64_t* sizes, void* const* addresses, const int64_t* choice, void* workspace) {
  using namespace fastrnn::cuda;
  (void)workspace;
  const fastrnn::BackwardParams p = unpack(sizes, addresses, BACKWARD);
  return NAME::CALL;
}
"""
STEP_LAUNCHER = """
FASTRNN_EXPORT int run_NAME(const int64_t* sizes, void* const* addresses, void* const* buffers, int which,
                              int64_t k) {
  using namespace fastrnn::cuda;
  const StepBuffers b = unpack_buffers(buffers);
  const fastrnn::BackwardParams p = unpack(sizes, addresses, BACKWARD);
  if (which == 0 || which == 7) return NAME::EDGE(p, b, nullptr);
  return NAME::step_WHICH(p, k, b, nullptr);
}
"""


def once(text, old, new):
    assert text.count(old) == 1, f"{text.count(old)} places for {old!r}"
    return text.replace(old, new)


def symbol(name):
    return "faulty_" + re.sub(r"\W", "_", name)


def faulty_source(name):
    fault, space = FAULTS[name], symbol(name)
    text = "\n".join((ROOT / "csrc/cuda" / file.format(fault.which)).read_text() for file in FILES[fault.tier])
    if fault.text:
        text = once(text, fault.text, fault.instead)
    text = re.sub(r"^(#pragma once|#include .*)$", "", text, flags=re.MULTILINE)
    # one cell, one dtype, one product
    text = once(text, "  FASTRNN_FOR_EACH_CELL(FASTRNN_DISPATCH)\n", '  FASTRNN_DISPATCH("lstm", LSTMCell, false)\n')
    text = once(text, "    case DType::kFloat16: return f(Type<dev::f16>{});\n", "")
    text = once(text, "    case DType::kFloat64: return f(Type<double>{});\n", "")
    text = once(text, "    default: return with_half(dtype, f);", "    default: return int(dev::kInvalidValue);")
    invalid = "return int(dev::kInvalidValue);"
    if fault.tier == "grid":
        half = text.index("      if (s.half)\n        return with_half(call.dtype")
        mma = text.index("      if (s.mma) {\n", half)
        ffma = text.index("      using Product = FfmaProduct<", mma)
        end = text.index(";\n", text.index("return launch_grid(", ffma)) + 2
        if fault.product == "ffma":
            text = text[:half] + text[ffma:]
        else:
            text = text[:half] + text[half:mma].replace("if (s.half)", "") + text[end:]
        both = "s.flags ? f(Type<ByFlags>{}, type) : f(Type<ByWords>{}, type)"
        text = once(text, both, "f(Type<ByFlags>{}, type)" if fault.flags else "f(Type<ByWords>{}, type)")
    elif fault.tier == "cluster":
        half = text.index("    if (s.half)\n      return with_half(p.dtype")
        mma = text.index("    if (s.mma) return with_masks", half)
        ffma = text.index("    return with_masks(Type<float>{}, Type<PushedFfmaProduct", mma)
        end = text.index(";\n", ffma) + 2
        if fault.product == "ffma":
            text = text[:half] + text[ffma:]
        else:
            text = text[:half] + text[half:mma].replace("if (s.half)", "") + text[end:]
    elif fault.tier == "resident":
        cut = r"(int with_{}_tile\(const ForwardParams&) p, int rows, F f\) {{\n.*?\n}}\n"
        other = "mma" if fault.product == "ffma" else "ffma"
        text, cuts = re.subn(cut.format(other), rf"\1, int, F) {{ {invalid} }}\n", text, flags=re.DOTALL)
        assert cuts == 1
        text = once(text, "rows == 1 ? f(cell, Constant<1>{}) : ", "") if fault.product == "ffma" else once(
            text, "return tiles::resident_warps(p.hidden) == 8 ? f(cell, storage, Constant<8>{})\n"
            "                                                  : f(cell, storage, Constant<12>{});",
            "return f(cell, storage, Constant<8>{});")  # fmt: skip
    text = text.replace("cuda::Exchange<", f"cuda::{space}::Exchange<")
    text = text.replace("namespace fastrnn::cuda {", f"namespace fastrnn::cuda::{space} {{")
    if fault.tier == "step":
        edge = {"forward": "start_forward", "backward": "finish_backward"}[fault.which]
        launcher = STEP_LAUNCHER.replace("EDGE", edge)
    else:
        launcher = WHOLE_LAUNCHER.replace("CALL", CALLS[fault.tier])
    for word, value in (("NAME", space), ("WHICH", fault.which), ("BACKWARD", str(fault.which == "backward").lower())):
        launcher = launcher.replace(word, value)
    return text + launcher


HEADERS = ("cells/registry.h", "cuda/device.cuh", "cuda/grid_tiles.h", "cuda/tiles.h", "launchers.h")
INCLUDES = "#include <cstdint>\n#include <type_traits>\n" + "".join(f'#include "{x}"\n' for x in HEADERS)


@pytest.fixture(scope="module")
def faulty():
    folder = OUT / "faults"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "launchers.cpp"]
    names = list(FAULTS)
    for i in range(0, len(names), 8):  # so many to a file, whose headers take as long to compile as two of them
        source = folder / f"faults_{i}.cu"
        text = INCLUDES + "".join(map(faulty_source, names[i : i + 8]))
        if not source.exists() or source.read_text() != text:
            replace_text(source, text)
        sources.append(source)
    return Cuda(build(sources, OUT / "libfaults.so"))


def results(faulty, fault, problems, tile):
    """What the last of so many launches gives."""
    backward, tier = fault.which == "backward", TIERS[fault.tier]
    faulty.reset()
    workspace = None
    for problem in problems:
        if backward:
            call = backward_call(faulty, *problem.back, in_place=fault.in_place)
        else:
            call = forward_call(faulty, problem.arguments, in_place=fault.in_place)
        if fault.tier != "step" and workspace is None:
            workspace = tier.workspace(call, backward, tile)
            if fault.launches > 1:
                choice = (ctypes.c_int64 * 8)(*tile)
                size = faulty.library.cuda_workspace(call.sizes, call.addresses, backward, choice)
                ctypes.memset(workspace, 0, size)
                faulty.library.emu_define(workspace, ctypes.c_size_t(size))
        tier.run(call, backward, tile, *([workspace] if workspace else []))
    found = " ".join(faulty.findings())
    left = sum(faulty.unwritten(call.places[x], call.results[x].nbytes) for x in call.written)
    return found, "left unwritten" if left else None if found else call.finish()


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed(faulty, name, monkeypatch):
    fault = FAULTS[name]
    dtype = torch.float32 if fault.product == "ffma" else torch.bfloat16
    h = 20 if fault.tier == "cluster" and not fault.alone else 9  # several blocks, but for the cluster of one
    case = Case("lstm", 4, 10, 1, h, 0, "rows", "state", "all", dtype)
    cluster = (3, 5, 12 if fault.product == "ffma" else 16, 0, 0, 0, 64, 0)
    tile = {"grid": (2, 10, 4, int(fault.flags), 0, 0, 64, 0), "step": None, "cluster": cluster,
            "resident": (1, 4 if fault.product == "ffma" else 8, *[0] * 6)}[fault.tier]  # fmt: skip
    entry = {"step": "cuda_step"}.get(fault.tier, f"cuda_{fault.which}")
    monkeypatch.setattr(faulty.library, entry, getattr(faulty.library, f"run_{symbol(name)}"))
    edit = (lambda arguments: arguments["reset_h"][:, -1].fill_(torch.inf)) if fault.infinite else None
    problems = [Problem(case, seed, edit) if edit else same_problem(case, seed) for seed in range(2)]
    if fault.which == "forward":
        truths = [(x.want, x.plain(False)) for x in problems]
    else:
        truths = [(x.want_back(), x.plain_back(False)) for x in problems]
    found, wrong = [], 0
    for i in faulty.schedules(seed=5, count=8):
        order = [problems[(i + n + 1) % 2] for n in range(fault.launches)]
        said, got = results(faulty, fault, order, tile)
        found.append(said)
        want, plain = truths[problems.index(order[-1])]
        if isinstance(got, tuple):
            got = any(not ours <= allowed for ours, allowed in errors(got, want, plain, dtype))
        wrong += bool(got)
    if fault.says == "":
        assert not any(found) and not wrong
    elif fault.says is None:
        assert wrong >= 4, (wrong, found)
    else:
        noticed = sum(bool(re.search(fault.says, x)) for x in found)
        assert noticed >= (1 if fault.says == "deadlock" else 4), found[:2]


def test_every_place_is_there():
    """A fault whose text is gone from the sources would be no fault."""
    for name in FAULTS:
        faulty_source(name)
