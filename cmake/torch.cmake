# SPDX-License-Identifier: Apache-2.0
# Finds libtorch inside a Python environment's wheel (no Python needed at link time) and offers it as msa_libtorch: the CPU
# libraries libtorch_cpu and libc10, with an rpath to the wheel and to the CUDA runtime wheels they load.
set(MSA_TORCH_SITE "${CMAKE_SOURCE_DIR}/.venv/lib" CACHE PATH
    "Folder searched for site-packages/torch: a Python environment's lib folder")
file(GLOB _msa_torch_headers "${MSA_TORCH_SITE}/python3*/site-packages/torch/include/torch/library.h"
     "${MSA_TORCH_SITE}/torch/include/torch/library.h")
if(NOT _msa_torch_headers)
  message(FATAL_ERROR "libtorch not found under MSA_TORCH_SITE=${MSA_TORCH_SITE}: run `make deps`, point MSA_TORCH_SITE "
                      "at an environment with torch installed, or configure with -DMSA_BUILD_TORCH=OFF")
endif()
list(GET _msa_torch_headers 0 _msa_torch_header)
cmake_path(GET _msa_torch_header PARENT_PATH _msa_torch)  # .../torch/include/torch
cmake_path(GET _msa_torch PARENT_PATH _msa_torch)
cmake_path(GET _msa_torch PARENT_PATH _msa_torch)         # .../torch
cmake_path(GET _msa_torch PARENT_PATH _msa_site)
set(MSA_TORCH_LIB "${_msa_torch}/lib")
file(GLOB _msa_cuda_libs "${_msa_site}/nvidia/cu*/lib" "${_msa_site}/nvidia/cuda_*/lib")

add_library(msa_libtorch INTERFACE)
target_include_directories(msa_libtorch SYSTEM INTERFACE "${_msa_torch}/include"
                                                         "${_msa_torch}/include/torch/csrc/api/include")
target_link_libraries(msa_libtorch INTERFACE "${MSA_TORCH_LIB}/libtorch_cpu.so" "${MSA_TORCH_LIB}/libc10.so")
target_link_options(msa_libtorch INTERFACE "-Wl,-rpath,${MSA_TORCH_LIB}")
foreach(_dir IN LISTS _msa_cuda_libs)
  target_link_options(msa_libtorch INTERFACE "-Wl,-rpath,${_dir}" "-Wl,-rpath-link,${_dir}")
endforeach()
