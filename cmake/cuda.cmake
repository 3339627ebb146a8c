# SPDX-License-Identifier: Apache-2.0
# Whether the CUDA backend is built (MSA_CUDA: AUTO, ON, OFF), and for what. AUTO builds it where there are a compiler and
# a GPU; elsewhere src/no_cuda takes its place. The CUDA language is enabled only when it is needed. Device code is for
# sm_90a alone: wgmma and setmaxnreg exist there only, and nothing would be gained by carrying code that cannot run.
set(MSA_CUDA AUTO CACHE STRING "Build the CUDA backend: AUTO (where nvcc and a GPU are), ON or OFF")
set_property(CACHE MSA_CUDA PROPERTY STRINGS AUTO ON OFF)

find_program(MSA_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
mark_as_advanced(MSA_NVCC)
if(MSA_CUDA STREQUAL "AUTO")
  set(MSA_HAS_CUDA OFF)
  set(_msa_nvcc_release 0)
  if(MSA_NVCC)
    execute_process(COMMAND ${MSA_NVCC} --version OUTPUT_VARIABLE _msa_nvcc ERROR_QUIET)
    if(_msa_nvcc MATCHES "release ([0-9]+\\.[0-9]+)")
      set(_msa_nvcc_release ${CMAKE_MATCH_1})
    endif()
  endif()
  if(_msa_nvcc_release VERSION_GREATER_EQUAL 12.5)  # the first with cudaGetDriverEntryPointByVersion
    set(_msa_has_gpu OFF)
    if(EXISTS /dev/nvidia0)
      set(_msa_has_gpu ON)
    else()
      find_program(MSA_NVIDIA_SMI nvidia-smi)
      mark_as_advanced(MSA_NVIDIA_SMI)
      if(MSA_NVIDIA_SMI)
        execute_process(COMMAND ${MSA_NVIDIA_SMI} -L OUTPUT_VARIABLE _msa_gpus RESULT_VARIABLE _msa_status ERROR_QUIET)
        if(_msa_status EQUAL 0 AND _msa_gpus MATCHES "GPU [0-9]")
          set(_msa_has_gpu ON)
        endif()
      endif()
    endif()
    set(MSA_HAS_CUDA ${_msa_has_gpu})
  endif()
elseif(MSA_CUDA)
  if(NOT MSA_NVCC AND NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "MSA_CUDA=ON, but there is no nvcc: put it on the PATH, name it with -DCMAKE_CUDA_COMPILER=..., "
                        "or configure with -DMSA_CUDA=OFF")
  endif()
  set(MSA_HAS_CUDA ON)
else()
  set(MSA_HAS_CUDA OFF)
endif()

if(MSA_HAS_CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER ${MSA_NVCC})
  endif()
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # named in full below: CMake 3.25 does not know every suffix
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # nvcc has C++20 since 12.0, CMake 3.25 has not heard of it
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  find_package(CUDAToolkit REQUIRED)
endif()
message(STATUS "CUDA backend: ${MSA_HAS_CUDA} (MSA_CUDA=${MSA_CUDA})")

# The flags of every CUDA source. No fast math: the order and rounding of sums are promised. Warnings of the device
# compiler are kept out of -Werror, since its versions differ in them.
set(MSA_CUDA_FLAGS
    -gencode=arch=compute_90a,code=sm_90a
    --expt-relaxed-constexpr
    -lineinfo
    -Xcompiler=-Wall,-Wextra,-Wno-unused-function
    -Xptxas=-v)
