// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/parse.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

#include <arpa/inet.h>

#include <fmt/format.h>

#include "bpf/event.h"
#include "core/address.h"

namespace finrace {

namespace {

template <typename Number>
std::optional<Number> whole_number(std::string_view text)
{
    Number value{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || error != std::errc{} || end != text.data() + text.size())
        return std::nullopt;
    return value;
}

bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/// Splits "12.5ms" into its number and its unit.
std::pair<std::string_view, std::string_view> split_unit(std::string_view text)
{
    const auto end = std::find_if(text.begin(), text.end(), [](char c) { return !is_digit(c) && c != '.'; });
    const auto length = static_cast<std::size_t>(end - text.begin());
    return {text.substr(0, length), text.substr(length)};
}

constexpr std::string_view address_forms = "accepted: 10.0.0.5, 10.0.0.0/8, 10.0.0.5:8080, :8080, 2001:db8::5, "
                                           "2001:db8::/32, [2001:db8::5]:8080, [2001:db8::/32]:8080";

[[noreturn]] void refuse_address(std::string_view text, std::string_view why)
{
    throw UsageError(fmt::format("'{}' is no address pattern: {}; {}", text, why, address_forms));
}

/// What was meant, perhaps, by what is no address.
std::string wrong_host_text(std::string_view host)
{
    const auto is_of_name = [](char c) {
        return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '_' || c == '.';
    };
    if (std::all_of(host.begin(), host.end(), is_of_name) &&
        !std::all_of(host.begin(), host.end(), [](char c) { return is_digit(c) || c == '.'; }))
        return fmt::format("connections have addresses, no names: see getent ahosts {}", host);
    return fmt::format("'{}' is neither an IPv4 nor an IPv6 address", host);
}

/// What lies between "http://" and the path, without credentials.
std::string_view host_of_url(std::string_view url, std::string_view::size_type scheme_end)
{
    std::string_view host = url.substr(scheme_end);
    host = host.substr(0, host.find_first_of("/?#"));
    return host.substr(host.rfind('@') + 1); // npos + 1 is 0
}

bool parse_address(std::string_view text, AddressPattern& pattern)
{
    const std::string terminated(text);
    if (::inet_pton(AF_INET, terminated.c_str(), pattern.address.data()) == 1) {
        pattern.family = 4;
        pattern.prefix = 32;
        return true;
    }
    if (::inet_pton(AF_INET6, terminated.c_str(), pattern.address.data()) == 1) {
        pattern.family = 6;
        pattern.prefix = 128;
        return true;
    }
    return false;
}

/// Events carry IPv4-mapped addresses as IPv4, so a pattern of one must do the same.
void unmap(AddressPattern& pattern)
{
    if (pattern.family != 6 || pattern.prefix < 96 || !is_ipv4_mapped(pattern.address.data()))
        return;
    ipv4_from_mapped(pattern.address.data());
    pattern.family = 4;
    pattern.prefix = static_cast<std::uint8_t>(pattern.prefix - 96);
}

} // namespace

std::chrono::nanoseconds parse_duration(std::string_view text)
{
    struct Unit {
        std::string_view name;
        double ns;
    };
    static constexpr std::array<Unit, 5> units{
        Unit{"us", 1e3}, Unit{"ms", 1e6}, Unit{"s", 1e9}, Unit{"m", 60e9}, Unit{"h", 3600e9},
    };
    static constexpr std::string_view forms = "accepted: numbers with units: 250ms, 10s, 1.5s, 2m, 1h30m";
    static constexpr double longest_ns = 366.0 * 24 * 3600e9;

    double ns = 0;
    std::string_view rest = text;
    do {
        const auto [number, behind] = split_unit(rest);
        const std::string_view unit = behind.substr(0, behind.find_first_of("0123456789."));
        const std::optional<double> value = whole_number<double>(number);
        if (!value)
            throw UsageError(fmt::format("'{}' is no duration; {}", text, forms));
        if (unit.empty())
            throw UsageError(fmt::format("'{}' has no unit; {}", text, forms));
        const auto* const found =
            std::find_if(units.begin(), units.end(), [unit](const Unit& u) { return u.name == unit; });
        if (found == units.end())
            throw UsageError(fmt::format("'{}' has an unknown unit '{}'; {}", text, unit, forms));
        ns += *value * found->ns;
        rest = behind.substr(unit.size());
    } while (!rest.empty());
    if (ns > longest_ns)
        throw UsageError(fmt::format("'{}' is longer than a year", text));
    return std::chrono::nanoseconds(std::llround(ns));
}

std::uint64_t parse_size(std::string_view text)
{
    static constexpr std::string_view forms = "accepted: bytes, or with a suffix k, M or G: 65536, 64k, 4M";
    const auto [number, suffix] = split_unit(text);
    const std::optional<std::uint64_t> value = whole_number<std::uint64_t>(number);
    unsigned shift = 0;
    if (suffix == "k" || suffix == "K")
        shift = 10;
    else if (suffix == "M")
        shift = 20;
    else if (suffix == "G")
        shift = 30;
    else if (!suffix.empty())
        throw UsageError(fmt::format("'{}' has an unknown suffix '{}'; {}", text, suffix, forms));
    if (!value || *value > (UINT64_MAX >> shift))
        throw UsageError(fmt::format("'{}' is no size; {}", text, forms));
    return *value << shift;
}

bool AddressPattern::matches(const std::uint8_t* other, std::uint8_t other_family, std::uint16_t other_port) const
{
    if ((family != any_family && other_family != family) || (port && *port != other_port))
        return false;
    const unsigned whole = prefix / 8U;
    const unsigned rest = prefix % 8U;
    if (std::memcmp(other, address.data(), whole) != 0)
        return false;
    return rest == 0 || ((other[whole] ^ address[whole]) >> (8U - rest)) == 0;
}

AddressPattern parse_address_pattern(std::string_view text)
{
    constexpr std::string_view scheme_mark = "://";
    AddressPattern pattern;
    std::string_view host = text;
    std::string_view port;
    bool has_port = false;

    if (const std::size_t mark = text.find(scheme_mark); mark != std::string_view::npos) {
        const std::string_view wanted = host_of_url(text, mark + scheme_mark.size());
        parse_address_pattern(wanted); // what is wrong with that is told first
        refuse_address(text, fmt::format("it is a URL; write {}", wanted));
    }
    if (!text.empty() && std::all_of(text.begin(), text.end(), is_digit))
        refuse_address(text, fmt::format("for that port of any address write :{}", text));
    if (text.starts_with('[')) {
        const std::size_t end = text.find(']');
        if (end == std::string_view::npos)
            refuse_address(text, "the bracket is not closed");
        host = text.substr(1, end - 1);
        port = text.substr(end + 1);
        has_port = !port.empty();
        if (has_port && !port.starts_with(':'))
            refuse_address(text, "a port must follow the bracket");
    } else if (std::count(text.begin(), text.end(), ':') == 1) {
        host = text.substr(0, text.find(':'));
        port = text.substr(text.find(':'));
        has_port = true;
    }

    std::optional<unsigned> prefix;
    if (const std::size_t slash = host.find('/'); slash != std::string_view::npos) {
        prefix = whole_number<unsigned>(host.substr(slash + 1));
        if (!prefix)
            refuse_address(text, "the prefix length is no number");
        host = host.substr(0, slash);
    }
    if (has_port && text.starts_with(':'))
        pattern = {.family = AddressPattern::any_family, .prefix = 0, .port = {}};
    else if (!parse_address(host, pattern))
        refuse_address(text, wrong_host_text(host));
    if (prefix) {
        if (*prefix > pattern.prefix)
            refuse_address(text, fmt::format("the prefix length is at most {}", pattern.prefix));
        pattern.prefix = static_cast<std::uint8_t>(*prefix);
    }
    if (has_port) {
        pattern.port = whole_number<std::uint16_t>(port.substr(1));
        if (!pattern.port || *pattern.port == 0)
            refuse_address(text, "a port is a number from 1 to 65535");
    }
    unmap(pattern);
    return pattern;
}

ProcessPattern parse_process_pattern(std::string_view text)
{
    static constexpr std::string_view forms = "accepted: a process id, or a name as in /proc/PID/comm: 1234, nginx";
    if (text.empty())
        throw UsageError(fmt::format("a process is needed; {}", forms));
    if (std::all_of(text.begin(), text.end(), is_digit)) {
        const std::optional<std::uint32_t> pid = whole_number<std::uint32_t>(text);
        if (!pid || *pid == 0)
            throw UsageError(fmt::format("'{}' is no process id; {}", text, forms));
        return {.pid = pid, .name = {}};
    }
    if (text.size() >= FINRACE_COMM_LEN)
        throw UsageError(fmt::format("'{}' is longer than the {} bytes that the kernel keeps of a name: '{}'; {}", text,
                                     FINRACE_COMM_LEN - 1, text.substr(0, FINRACE_COMM_LEN - 1), forms));
    return {.pid = std::nullopt, .name = std::string(text)};
}

} // namespace finrace
