// SPDX-License-Identifier: Apache-2.0
// The tokenizer on small vocabularies written here: order of merges, added tokens, streaming, hostile files. Equality
// with the tokenizers package on real settings is tested in tests/python/test_tokenizer.py.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "src/model/files/json.h"
#include "src/model/files/tokenizer.h"
#include "tests/unit/files_support.h"

namespace msa::files {
namespace {

using Ids = std::vector<std::int32_t>;

/// A document with vocabulary a b c ab bc abc " " é's two bytes, changed by `changes` (a JSON merge patch).
std::string document(const std::string& changes = "{}") {
  Json json = parse_json(R"({"added_tokens":[{"id":20,"content":"<s>","special":true},{"id":21,"content":"<s><t>"},
    {"id":22,"content":"<w>","single_word":true,"normalized":false},
    {"id":23,"content":"<l>","lstrip":true,"rstrip":true,"normalized":false}],
    "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"use_regex":true},"decoder":{"type":"ByteLevel"},
    "model":{"type":"BPE","vocab":{"a":0,"b":1,"c":2,"ab":3,"bc":4,"abc":5,"\u0120":6,"\u00c3":7,"\u00a9":8,"<s>":20},
    "merges":[["b","c"],["a","b"],["a","bc"]]}})",
                         "base");
  json.merge_patch(parse_json(changes, "changes"));
  return json.dump();
}

Tokenizer make(const std::string& changes = "{}") { return Tokenizer::parse(document(changes), "tokenizer.json"); }

TEST(Tokenizer, MergesByRank) {
  EXPECT_EQ(make().encode("abc"), Ids{5});  // b c first, then a bc
  EXPECT_EQ(make().encode("ab"), Ids{3});
  EXPECT_EQ(make().encode("aab bc"), (Ids{0, 3, 6, 4}));
  EXPECT_EQ(make().encode(""), Ids{});
  EXPECT_EQ(make(R"({"model":{"merges":["b c","a b","a bc"]}})").encode("abcab"), (Ids{5, 3}));
  EXPECT_EQ(make(R"({"model":{"merges":[["a","b"]]}})").encode("abc"), (Ids{3, 2}));
  EXPECT_EQ(make(R"({"model":{"merges":[["a","b"]],"ignore_merges":true}})").encode("abc"), Ids{5});
}

TEST(Tokenizer, BytesOutsideTheVocabulary) {
  EXPECT_EQ(make().encode("azzb"), Ids{3});  // dropped, and then neighbours
  EXPECT_EQ(make(R"({"model":{"unk_token":"c"}})").encode("azzb"), (Ids{0, 2, 2, 1}));
  EXPECT_EQ(make(R"({"model":{"unk_token":"c","fuse_unk":true}})").encode("azzb"), (Ids{0, 2, 1}));
}

TEST(Tokenizer, AddedTokens) {
  const Tokenizer tokenizer = make();
  EXPECT_EQ(tokenizer.encode("a<s>b"), (Ids{0, 20, 1}));
  EXPECT_EQ(tokenizer.encode("<s><s>"), (Ids{20, 20}));
  EXPECT_EQ(tokenizer.encode("<w> a<w>"), (Ids{22, 6, 0}));  // not beside a letter: its characters are unknown here
  EXPECT_EQ(tokenizer.encode("a \n <l>  b"), (Ids{0, 23, 1}));
  EXPECT_EQ(tokenizer.encode("a<s>b", {.parse_special_tokens = false}), (Ids{0, 1}));  // unknown characters
  EXPECT_TRUE(tokenizer.is_special(20));
  EXPECT_FALSE(tokenizer.is_special(21) || tokenizer.is_special(0) || tokenizer.is_special(99));
  EXPECT_EQ(tokenizer.find_token("<w>"), 22);
  EXPECT_EQ(tokenizer.find_token("none"), std::nullopt);
  EXPECT_EQ(tokenizer.vocab_size(), 24);
}

TEST(Tokenizer, AddsWhatThePostProcessorSays) {
  const Tokenizer tokenizer = make(R"({"post_processor":{"type":"Sequence","processors":[{"type":"ByteLevel"},
    {"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],
     "special_tokens":{"<s>":{"id":"<s>","ids":[20],"tokens":["<s>"]}}}]}})");
  EXPECT_EQ(tokenizer.encode("a"), (Ids{20, 0}));
  EXPECT_EQ(tokenizer.encode(""), Ids{20});
  EXPECT_EQ(tokenizer.encode("a", {.add_special_tokens = false}), Ids{0});
}

TEST(Tokenizer, DecodesAndStreams) {
  const Tokenizer tokenizer = make();
  const Ids ids = {0, 7, 8, 20, 6, 8, 7, 99, -1, 7};
  const std::string bad = "\xef\xbf\xbd";
  EXPECT_EQ(tokenizer.decode(ids), "a\xc3\xa9<s> " + bad + bad + bad);
  EXPECT_EQ(tokenizer.decode(ids, true), "a\xc3\xa9 " + bad + bad + bad);
  StreamingDecoder decoder(tokenizer);
  EXPECT_EQ(decoder.push(0), "a");
  EXPECT_EQ(decoder.push(7), "");  // half a character
  EXPECT_EQ(decoder.push(8), "\xc3\xa9");
  EXPECT_EQ(decoder.push(20), "");
  EXPECT_EQ(decoder.push(7), "");
  EXPECT_EQ(decoder.finish(), bad);
  EXPECT_EQ(decoder.push(1), "b");
}

TEST(Tokenizer, RefusesByName) {
  const auto refuses = [](const std::string& changes, const std::string& part) { EXPECT_ERROR(make(changes), part); };
  refuses(R"({"model":{"type":"WordPiece"}})", "'WordPiece' is not supported");
  refuses(R"({"model":{"byte_fallback":true}})", "byte_fallback");
  refuses(R"({"model":{"dropout":0.1}})", "dropout");
  refuses(R"({"model":{"end_of_word_suffix":"</w>"}})", "end_of_word_suffix");
  refuses(R"({"model":null})", "model");
  refuses(R"({"model":{"vocab":null}})", "model.vocab");
  refuses(R"({"model":{"vocab":{"x":0}}})", "two tokens have id 0");
  refuses(R"({"model":{"vocab":{"x":-1}}})", "the id of 'x'");
  refuses(R"({"model":{"vocab":{"x":4294967296}}})", "the id of 'x'");
  refuses(R"({"model":{"merges":[["a","zz"]]}})", "'zz' is not in the vocabulary");
  refuses(R"({"model":{"merges":[["c","a"]]}})", "'ca' is not in the vocabulary");
  refuses(R"({"model":{"merges":["ab"]}})", "two tokens");
  refuses(R"({"model":{"merges":["a b c"]}})", "two tokens");
  refuses(R"({"model":{"merges":[7]}})", "model.merges");
  refuses(R"({"model":{"unk_token":"zz"}})", "unk_token");
  refuses(R"({"normalizer":{"type":"NFKC"}})", "'NFKC' is not supported");
  refuses(R"({"pre_tokenizer":null})", "pre_tokenizer");
  refuses(R"({"pre_tokenizer":{"type":"Metaspace"}})", "pre_tokenizer");
  refuses(R"({"pre_tokenizer":{"type":"Digits"}})", "ByteLevel must be there");
  refuses(R"({"post_processor":{"type":"RobertaProcessing"}})", "'RobertaProcessing' is not supported");
  refuses(R"({"decoder":{"type":"Metaspace"}})", "'Metaspace' is not supported");
  refuses(R"({"added_tokens":[{"id":1,"content":"<x>"}]})", "belongs to another token");
  refuses(R"({"added_tokens":[{"id":30,"content":"a"}]})", "the vocabulary says 0");
  refuses(R"({"added_tokens":[{"content":"<x>"}]})", "has no id");
  refuses(R"({"added_tokens":[{"id":30,"content":"<x>"},{"id":31,"content":"<x>"}]})", "listed twice");
  refuses("{\"added_tokens\":[{\"id\":30,\"content\":\"" + std::string(513, 'x') + "\"}]}", "more than 512 bytes");
  EXPECT_ERROR(Tokenizer::parse("[]", "tokenizer.json"), "tokenizer.json");
}

TEST(Tokenizer, HostilePatternEndsInAnError) {
  const Tokenizer tokenizer =
      make(R"({"pre_tokenizer":{"type":"Sequence","use_regex":null,"pretokenizers":[{"type":"Split",
    "pattern":{"Regex":"(?:a+)+[!?]"},"behavior":"Isolated"},{"type":"ByteLevel"}]}})");
  EXPECT_ERROR(tokenizer.encode(std::string(300, 'a')), "too many steps");
}

TEST(TokenizerSettings, ReadsBothForms) {
  const TokenizerSettings settings = parse_tokenizer_settings(
      R"({"bos_token":{"content":"<s>"},"eos_token":"</s>","chat_template":[{"name":"tool","template":"x"},
          {"name":"default","template":"y"}]})",
      "t");
  EXPECT_EQ(settings.bos_token, "<s>");
  EXPECT_EQ(settings.eos_token, "</s>");
  EXPECT_EQ(settings.chat_template, "y");
  EXPECT_EQ(parse_tokenizer_settings(R"({"bos_token":null,"chat_template":"z"})", "t").chat_template, "z");
  EXPECT_ERROR(parse_tokenizer_settings("3", "t"), "must be a JSON object");
  const TemporaryDirectory directory;
  EXPECT_TRUE(load_tokenizer_settings(directory.path()).chat_template.empty());
  put_file(directory.path() / "chat_template.jinja", "from file");
  EXPECT_EQ(load_tokenizer_settings(directory.path()).chat_template, "from file");
}

}  // namespace
}  // namespace msa::files
