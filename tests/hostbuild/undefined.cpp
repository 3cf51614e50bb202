// Undefined behaviour in kernels: the calls -fsanitize=bounds,shift,... makes, turned into findings.
#include "runtime.h"

using namespace fastrnn::emu;

#define FASTRNN_HANDLER(name, text) \
  extern "C" void __ubsan_handle_##name(void*) { report_at(FASTRNN_PC, #name, "undefined: " text); }

FASTRNN_HANDLER(out_of_bounds, "index outside an array")
FASTRNN_HANDLER(shift_out_of_bounds, "shift by a negative or too large count")
FASTRNN_HANDLER(add_overflow, "signed overflow in an addition")
FASTRNN_HANDLER(sub_overflow, "signed overflow in a subtraction")
FASTRNN_HANDLER(mul_overflow, "signed overflow in a multiplication")
FASTRNN_HANDLER(negate_overflow, "signed overflow in a negation")
FASTRNN_HANDLER(divrem_overflow, "division by zero")
FASTRNN_HANDLER(type_mismatch_v1, "misaligned or null pointer")
