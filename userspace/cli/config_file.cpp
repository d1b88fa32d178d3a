// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/config_file.h"

#include <algorithm>
#include <string_view>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <toml++/toml.h>

#include "cli/options.h"
#include "cli/parse.h"

namespace finrace {

namespace {

constexpr std::size_t largest_file = 1U << 16U;

/// What is for the command line alone: what reads the file, and what makes a run no service.
constexpr std::string_view not_keys[] = {"help", "config", "check-config", "replay"};

std::string key_of(const CLI::Option& option)
{
    if (option.get_lnames().empty())
        return {};
    std::string key = option.get_lnames().front();
    if (std::find(std::begin(not_keys), std::end(not_keys), key) != std::end(not_keys))
        return {};
    std::replace(key.begin(), key.end(), '-', '_');
    return key;
}

std::string kind_of(const CLI::Option& option)
{
    if (option.get_expected_max() == 0)
        return "true or false";
    const std::string one = fmt::format("\"{}\"", option.get_type_name());
    return option.get_multi_option_policy() == CLI::MultiOptionPolicy::TakeAll
               ? fmt::format("{}, or [{}, ...]", one, one)
               : one;
}

std::string place_of(const std::string& path, const toml::source_region& source)
{
    return fmt::format("{}:{}", path, source.begin.line);
}

/// The texts that a flag would have. Nothing if the value is of no kind that it takes.
std::vector<std::string> texts_of(const CLI::Option& option, const toml::node& value)
{
    const auto text_of = [](const toml::node& one) -> std::vector<std::string> {
        if (const auto* text = one.as_string())
            return {text->get()};
        if (const auto* number = one.as_integer())
            return {std::to_string(number->get())};
        return {};
    };
    if (option.get_expected_max() == 0) {
        const auto* flag = value.as_boolean();
        return flag != nullptr ? std::vector<std::string>{flag->get() ? "true" : "false"} : std::vector<std::string>();
    }
    const auto* all = value.as_array();
    if (all == nullptr)
        return text_of(value);
    if (option.get_multi_option_policy() != CLI::MultiOptionPolicy::TakeAll)
        return {};
    std::vector<std::string> texts;
    for (const toml::node& one : *all) {
        const auto text = text_of(one);
        if (text.empty())
            return {};
        texts.push_back(text.front());
    }
    return texts;
}

} // namespace

void add_config_options(CLI::App& command, ConfigFile& config)
{
    CLI::Option* file =
        command
            .add_option("--config", config.path,
                        "a TOML file that says what these flags say: a key for each, with _ for -; flags win")
            ->type_name("FILE");
    command.add_flag("--check-config", config.only_checked, "say whether that file is good, and end")->needs(file);
}

Settings settings_of(const CLI::App& command)
{
    Settings settings;
    for (const CLI::Option* option : command.get_options())
        if (const std::string key = key_of(*option); !key.empty())
            settings[key] = option->results();
    return settings;
}

void take_settings(CLI::App& command, const Settings& settings)
{
    for (CLI::Option* option : command.get_options({})) {
        const auto found = settings.find(key_of(*option));
        if (found == settings.end() || found->second.empty())
            continue;
        for (const std::string& text : found->second)
            option->add_result(text);
        option->run_callback();
    }
}

KeyPlaces take_config_text(CLI::App& command, const std::string& path, std::string_view text)
{
    KeyPlaces places;
    toml::table file;
    try {
        file = toml::parse(text, path);
    } catch (const toml::parse_error& error) {
        throw UsageError(fmt::format("{}: {}", place_of(path, error.source()), error.description()));
    }
    std::vector<std::string> known;
    for (const CLI::Option* option : command.get_options())
        if (std::string key = key_of(*option); !key.empty())
            known.push_back(std::move(key));
    std::vector<std::pair<toml::key, const toml::node*>> in_order;
    for (const auto& [key, value] : file)
        in_order.emplace_back(key, &value);
    std::sort(in_order.begin(), in_order.end(),
              [](const auto& one, const auto& other) { return one.first.source().begin < other.first.source().begin; });
    for (const auto& [key, node] : in_order) {
        const toml::node& value = *node;
        const std::string where = fmt::format("{}: {}", place_of(path, key.source()), key.str());
        const auto options = command.get_options(
            [&key = key](const CLI::Option* option) { return key_of(*option) == key.str() && !key.str().empty(); });
        if (options.empty())
            throw UsageError(fmt::format("{} is no key; accepted: {}", where, fmt::join(known, ", ")));
        CLI::Option* option = options.front();
        const std::vector<std::string> texts = texts_of(*option, value);
        const bool none = value.is_array() && value.as_array()->empty() &&
                          option->get_multi_option_policy() == CLI::MultiOptionPolicy::TakeAll;
        if (texts.empty() && !none)
            throw UsageError(fmt::format("{} takes no such value; accepted: {}", where, kind_of(*option)));
        if (option->count() > 0 || texts.empty())
            continue;
        for (const std::string& one : texts)
            option->add_result(one);
        try {
            option->run_callback();
        } catch (const CLI::ParseError& error) {
            // CLI11 puts the flag's name before what is wrong with it.
            const std::string name = option->get_name() + ": ";
            std::string said = error.what();
            if (said.starts_with(name))
                said.erase(0, name.size());
            throw UsageError(fmt::format("{}: {}", where, said));
        }
        places.emplace(option->get_name(), where);
    }
    return places;
}

KeyPlaces take_config(CLI::App& command, const std::string& path)
{
    return take_config_text(command, path, read_small_file(path, largest_file, "--config"));
}

std::string located(const KeyPlaces& places, const std::string& text)
{
    constexpr std::string_view mark = "--";
    constexpr std::string_view letters = "abcdefghijklmnopqrstuvwxyz-";
    for (std::size_t at = text.find(mark); at != std::string::npos; at = text.find(mark, at + mark.size())) {
        const std::size_t end = std::min(text.find_first_not_of(letters, at), text.size());
        if (const auto found = places.find(std::string_view(text).substr(at, end - at)); found != places.end())
            return fmt::format("{}: {}", found->second, text);
    }
    return text;
}

} // namespace finrace
