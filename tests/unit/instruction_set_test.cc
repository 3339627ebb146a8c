// SPDX-License-Identifier: Apache-2.0
// Choosing an instruction set: by force and by the environment variable MSA_ISA.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "msa/context.h"
#include "msa/error.h"

namespace msa::testing {
namespace {

TEST(InstructionSet, EverySupportedSetCanBeForced) {
  const std::vector<std::string> sets = supported_instruction_sets();
  ASSERT_FALSE(sets.empty());
  for (const std::string& set : sets) {
    force_instruction_set(set);
    EXPECT_EQ(active_instruction_set(), set);
  }
  force_instruction_set("");
}

TEST(InstructionSet, TheBestIsTheDefault) {
  const char* wanted = std::getenv("MSA_ISA");
  force_instruction_set("");
  EXPECT_EQ(active_instruction_set(), wanted != nullptr ? std::string(wanted) : supported_instruction_sets().front());
}

TEST(InstructionSet, AnUnknownOneIsRefusedWithTheChoices) {
  const std::string before = active_instruction_set();
  try {
    force_instruction_set("altivec");
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("altivec"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find(supported_instruction_sets().front()), std::string::npos);
  }
  EXPECT_EQ(active_instruction_set(), before);
}

TEST(InstructionSet, TheEnvironmentNamesTheDefault) {
  const char* before = std::getenv("MSA_ISA");
  const std::string saved = before != nullptr ? before : "";
  for (const std::string& set : supported_instruction_sets()) {
    ASSERT_EQ(setenv("MSA_ISA", set.c_str(), 1), 0);
    force_instruction_set("");
    EXPECT_EQ(active_instruction_set(), set);
  }
  ASSERT_EQ(setenv("MSA_ISA", "altivec", 1), 0);
  try {
    force_instruction_set("");
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("MSA_ISA"), std::string::npos);
  }
  if (saved.empty()) {
    unsetenv("MSA_ISA");
  } else {
    setenv("MSA_ISA", saved.c_str(), 1);
  }
  force_instruction_set("");
}

}  // namespace
}  // namespace msa::testing
