#include "ops/facts.h"

#include <cmath>
#include <iomanip>
#include <limits>
#include <sstream>

#include "codecs/all.h"
#include "formats/all.h"
#include "ops/int8/int8.h"
#include "ops/norms/norm_math.h"
#include "rules/all.h"

namespace bnbops {
namespace {

std::string number_text(double value) {  // null where there is no bound
  if (!(std::fabs(value) < std::numeric_limits<double>::max())) return "null";
  std::ostringstream digits;
  digits << std::setprecision(17) << value;
  return digits.str();
}

// The members of a JSON object, one by one.
class Object {
 public:
  Object& text(const char* key, const std::string& value) { return json(key, '"' + value + '"'); }
  Object& flag(const char* key, bool value) { return json(key, value ? "true" : "false"); }
  Object& number(const char* key, double value) { return json(key, number_text(value)); }
  Object& json(const char* key, const std::string& value) {
    members_ += (members_.empty() ? "\"" : ", \"") + std::string(key) + "\": " + value;
    return *this;
  }
  std::string end() const { return '{' + members_ + '}'; }

 private:
  std::string members_;
};

template <class Items, class Text>
std::string list(const Items& items, const Text& text) {
  std::string json;
  for (const auto& item : items) json += (json.empty() ? "" : ", ") + text(item);
  return '[' + json + ']';
}

std::string state_facts(const StateSpec& state) {
  return Object().text("name", state.name).text("role", name_of(state.role)).end();
}

std::string option_facts(const OptionSpec& option) {
  return Object()
      .text("name", option.name)
      .text("type", option.type)
      .number("from", option.range.from)
      .number("below", option.range.below)
      .text("range", option.range.text)
      .end();
}

template <class Rule>
std::string rule_facts() {
  const std::vector<StateSpec> states(Rule::kStateSpecs, Rule::kStateSpecs + Rule::kStates);
  return Object()
      .json("states", list(states, state_facts))
      .json("options", list(Rule::kOptions, option_facts))
      .text("trust", name_of(Rule::kTrust))
      .end();
}

std::string number_facts(float value) {
  std::ostringstream digits;
  digits << std::setprecision(9) << value;
  return std::isnan(value) ? "NaN" : digits.str();
}

template <class Codec>
std::string codec_facts() {
  const auto values = [](bool is_signed) {
    return list(std::vector<float>(Codec::values(is_signed), Codec::values(is_signed) + kCodebookSize), number_facts);
  };
  return Object()
      .text("dtype", Codec::kCodes == CodeType::kUint8 ? "uint8" : "float8_e4m3fn")
      .json("signed", values(true))
      .json("unsigned", values(false))
      .end();
}

std::string format_facts(const Format4bit& format) {
  return Object()
      .json("values", list(format.values, number_text))
      .flag("high_nibble_first", format.nibbles == Nibbles::kHighFirst)
      .number("smallest_block", static_cast<double>(format.smallest_block))
      .end();
}

}  // namespace

std::string facts() {
  Object rules, codecs, roles, formats;
  for_each_rule(AllRules{}, [&](auto rule, int) { rules.json(rule.kName, rule_facts<decltype(rule)>()); });
  for_each_codec(AllCodecs{}, [&](auto codec, int) { codecs.json(codec.kName, codec_facts<decltype(codec)>()); });
  for (const Role role : kCodedRoles) {
    roles.json(name_of(role), Object().flag("signed", has_sign(role)).flag("divisor", is_divisor(role)).end());
  }
  for (const Format4bit& format : kFormats4bit) formats.json(format.name, format_facts(format));
  return Object()
      .json("rules", rules.end())
      .json("codecs", codecs.end())
      .json("roles", roles.end())
      .text("default_codec", kDefaultCodec)
      .text("uncoded", kUncodedName)
      .number("state_block", kStateBlock)
      .number("norm_history", kNormHistory)
      .json("formats_4bit", formats.end())
      .number("largest_block_4bit", kLargestBlock4bit)
      .number("most_int8_products", kMaxInt8Products)
      .end();
}

}  // namespace bnbops
