# SPDX-License-Identifier: Apache-2.0
# Warnings, sanitizers and floating-point rules shared by every target of ours, as one interface library.
add_library(msa_compile_options INTERFACE)
target_compile_options(
  msa_compile_options
  INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall>
            $<$<COMPILE_LANGUAGE:CXX>:-Wextra>
            $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${MSA_WERROR}>>:-Werror>
            # A compiler that fuses a*b+c where it likes would round the same row differently in different loops.
            $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)
if(MSA_SANITIZE)
  # For the C++ compiler alone: nvcc does not know these.
  target_compile_options(
    msa_compile_options
    INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${MSA_SANITIZE};-fno-omit-frame-pointer;-fno-sanitize-recover=all>")
  target_link_options(msa_compile_options INTERFACE -fsanitize=${MSA_SANITIZE})
endif()
