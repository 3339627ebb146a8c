// SPDX-License-Identifier: Apache-2.0
// Names that come out of a file, made fit for an error message: quoted, control characters and broken bytes shown as
// escapes, and cut when long, so that a hostile file cannot flood or garble a log. Tested in
// tests/unit/files_json_test.cc.
#pragma once

#include <string>
#include <string_view>

namespace msa::files {

/// `text` in single quotes, at most 240 bytes of it; bytes outside printable ASCII as \xNN.
std::string quote(std::string_view text);

}  // namespace msa::files
