// What the CUDA part of the library was compiled for, as in "sm_80 sm_90 + PTX 90": register.cpp, which the build
// tells, sets it for the messages of launch_error.h.
#pragma once

namespace llmkern {

inline const char* cuda_architectures = "";

}  // namespace llmkern
