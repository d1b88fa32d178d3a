// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/upstream_names.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <sys/random.h>

#include "cli/options.h"

namespace finrace {

namespace {

constexpr std::size_t longest_name = 100;
constexpr std::size_t largest_key_file = 4096;
constexpr std::size_t own_key_bytes = 32;

Disguise::Scope parse_scope(const std::string& text)
{
    return choose<Disguise::Scope>({{"clients", Disguise::Scope::clients}, {"all", Disguise::Scope::all}}, text);
}

bool is_utf8(const std::string& text)
{
    try {
        [[maybe_unused]] const std::string dumped = nlohmann::json(text).dump();
        return true;
    } catch (const nlohmann::json::type_error&) {
        return false;
    }
}

std::string own_key(std::string_view flag)
{
    std::string key(own_key_bytes, '\0');
    if (::getrandom(key.data(), key.size(), 0) != static_cast<ssize_t>(key.size()))
        throw UsageError(fmt::format("{}: no random numbers for a key: {}", flag, std::strerror(errno)));
    return key;
}

std::string key_of(const std::string& path)
{
    if (path.empty())
        return own_key("--hash-addresses");
    std::string key = read_small_file(path, largest_key_file, "--hash-key");
    if (key.size() < Disguise::shortest_key)
        throw UsageError(fmt::format("--hash-key {}: {} bytes are too few; accepted: {} and more, such as head -c 32 "
                                     "/dev/urandom gives",
                                     path, key.size(), Disguise::shortest_key));
    return key;
}

} // namespace

void UpstreamNames::add(const std::string& text)
{
    const std::size_t equals = text.find('=');
    const std::string name = equals == std::string::npos ? "" : text.substr(equals + 1);
    const bool printable = std::all_of(name.begin(), name.end(), [](unsigned char c) { return c >= ' ' && c != 0x7f; });
    if (name.empty() || name.size() > longest_name || !printable || !is_utf8(name))
        throw UsageError(
            fmt::format("'{}' names no upstream; accepted: ADDR[/LEN][:PORT]=NAME, :PORT=NAME, a name of at "
                        "most {} bytes",
                        text, longest_name));
    names_.add(parse_address_pattern(std::string_view(text).substr(0, equals)), name);
}

std::string_view UpstreamNames::of(const UpstreamKey& key) const
{
    const std::string* name = names_.of(key);
    return name != nullptr ? std::string_view(*name) : std::string_view();
}

Disguise AddressOptions::disguise() const
{
    if (masked && hashed)
        throw UsageError("--mask-addresses and --hash-addresses: give one of them");
    if (!key_path.empty() && !hashed)
        throw UsageError("--hash-key: that is for --hash-addresses; give that as well, or leave it out");
    if (masked)
        return {Disguise::Way::mask, *masked, own_key("--mask-addresses")};
    if (hashed)
        return {Disguise::Way::hash, *hashed, key_of(key_path)};
    return {};
}

void add_address_options(CLI::App& command, AddressOptions& options)
{
    add_parsed(
        command, "--upstream-name", "ADDR[/LEN][:PORT]=NAME",
        "what records and metrics call an upstream (peer.service); may be repeated, the first that matches counts",
        [&options](const std::string& text) { options.names.add(text); })
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
    add_parsed(command, "--mask-addresses", "clients|all",
               "records tell networks alone (/24, of IPv6 /48, of 6to4 /40): of clients, or of everybody",
               [&options](const std::string& text) { options.masked = parse_scope(text); });
    add_parsed(command, "--hash-addresses", "clients|all",
               "records tell pseudonyms, addresses in 100::/64: of clients, or of everybody",
               [&options](const std::string& text) { options.hashed = parse_scope(text); });
    command
        .add_option(
            "--hash-key", options.key_path,
            "a secret of 16 bytes and more: pseudonyms are the same wherever it is; else they last as long as the run")
        ->type_name("FILE");
}

} // namespace finrace
