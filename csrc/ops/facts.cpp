// What the tables here say, for whoever is not written in C++: rules, their states and options, sizes and limits, as a
// JSON object. docs/operators.md has its keys.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <iomanip>
#include <limits>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "codecs/all.h"
#include "formats/all.h"
#include "formats/int8.h"
#include "ops/norms/norm_math.h"
#include "rules/all.h"

namespace bnbops {
namespace {

// ---- JSON --------------------------------------------------------------------------------------------------------

std::string text(const std::string& value) { return '"' + value + '"'; }

std::string flag(bool value) { return value ? "true" : "false"; }

std::string digits(double value, int count) {
  std::ostringstream text;
  text << std::setprecision(count) << value;
  return text.str();
}

std::string number(double value) {  // null where there is no bound
  return std::fabs(value) < std::numeric_limits<double>::max() ? digits(value, 17) : "null";
}

std::string float32(float value) { return std::isnan(value) ? "NaN" : digits(value, 9); }

template <class Items, class Text>
std::string joined(const Items& items, const Text& text) {
  std::string all;
  for (const auto& item : items) all += (all.empty() ? "" : ", ") + text(item);
  return all;
}

template <class Items, class Text>
std::string list(const Items& items, const Text& text) {
  return '[' + joined(items, text) + ']';
}

using Members = std::vector<std::pair<std::string, std::string>>;

std::string object(const Members& members) {
  return '{' + joined(members, [](const auto& member) { return text(member.first) + ": " + member.second; }) + '}';
}

// ---- the tables --------------------------------------------------------------------------------------------------

template <class Rule>
std::string rule_facts() {
  const auto state = [](const StateSpec& spec) {
    return object({{"name", text(spec.name)}, {"role", text(name_of(spec.role))}});
  };
  const auto option = [](const OptionSpec& spec) {
    return object({{"name", text(spec.name)},
                   {"type", text(spec.type)},
                   {"from", number(spec.range.from)},
                   {"below", number(spec.range.below)},
                   {"range", text(spec.range.text)}});
  };
  const std::vector<StateSpec> states(Rule::kStateSpecs, Rule::kStateSpecs + Rule::kStates);
  return object({{"states", list(states, state)},
                 {"options", list(Rule::kOptions, option)},
                 {"trust", text(name_of(Rule::kTrust))}});
}

template <class Codec>
std::string codec_facts() {
  const auto values = [](bool is_signed) {
    const float* all = Codec::values(is_signed);
    return list(std::vector<float>(all, all + kCodebookSize), float32);
  };
  return object({{"dtype", text(Codec::kCodes == CodeType::kUint8 ? "uint8" : "float8_e4m3fn")},
                 {"signed", values(true)},
                 {"unsigned", values(false)}});
}

std::string format_facts(const Format4bit& format) {
  return object({{"values", list(format.values, number)},
                 {"high_nibble_first", flag(format.nibbles == Nibbles::kHighFirst)},
                 {"smallest_block", number(static_cast<double>(format.smallest_block))}});
}

std::string facts() {
  Members rules, codecs, roles, formats;
  for_each_rule(AllRules{}, [&](auto rule, int) { rules.emplace_back(rule.kName, rule_facts<decltype(rule)>()); });
  for_each_codec(AllCodecs{},
                 [&](auto codec, int) { codecs.emplace_back(codec.kName, codec_facts<decltype(codec)>()); });
  for (const Role role : kCodedRoles) {
    const Members is{{"signed", flag(has_sign(role))}, {"divisor", flag(is_divisor(role))}};
    roles.emplace_back(name_of(role), object(is));
  }
  for (const Format4bit& format : kFormats4bit) formats.emplace_back(format.name, format_facts(format));
  return object({{"rules", object(rules)},
                 {"codecs", object(codecs)},
                 {"roles", object(roles)},
                 {"default_codec", text(kDefaultCodec)},
                 {"uncoded", text(kUncodedName)},
                 {"state_block", number(kStateBlock)},
                 {"norm_history", number(kNormHistory)},
                 {"formats_4bit", object(formats)},
                 {"largest_block_4bit", number(kLargestBlock4bit)},
                 {"most_int8_products", number(kMaxInt8Products)}});
}

}  // namespace
}  // namespace bnbops

STABLE_TORCH_LIBRARY_IMPL(BNBOPS_LIBRARY, CompositeExplicitAutograd, m) { m.impl("facts", TORCH_BOX(&bnbops::facts)); }
