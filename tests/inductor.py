"""torch._inductor told to compile quickly, for tests that compile each model once."""

#: No headers are compiled ahead, no compiler is asked which vectors the processor has, and no processes are started for
#: it: each costs more than it saves.
QUICK = {"cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": False, "compile_threads": 1}
#: Of AOTInductor, besides.
QUICK_PACKAGE = {
    **QUICK,
    "aot_inductor.precompile_headers": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
}
