// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "sink/log_formats.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string_view>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "sink/facts.h"

namespace finrace {

namespace {

constexpr std::string_view own_names = "finrace.";

/// syslog(3) and RFC 5424, section 6.2.1.
constexpr int facility_daemon = 3;
constexpr int severity_warning = 4;
constexpr int severity_notice = 5;
constexpr int severity_informational = 6;

/// An empty text where there is none.
std::string text_at(const Json& record, const char* path)
{
    const Json::json_pointer where(path);
    return record.contains(where) && record[where].is_string() ? record[where].get<std::string>() : std::string();
}

std::uint64_t number_at(const Json& record, const char* path)
{
    const Json::json_pointer where(path);
    return record.contains(where) && record[where].is_number() ? record[where].get<std::uint64_t>() : 0;
}

/// verdict, connection, upstream, health.
std::string kind_of(const Json& record)
{
    const std::string name = text_at(record, "/event/name");
    return name.starts_with(own_names) ? name.substr(own_names.size()) : name;
}

int severity_of(const Json& record)
{
    const std::string kind = kind_of(record);
    if (kind == "verdict")
        return severity_warning;
    const Json::json_pointer complete("/finrace/health/complete");
    return record.contains(complete) && !record[complete].get<bool>() ? severity_notice : severity_informational;
}

std::string peer_of(const Json& record)
{
    const std::string address = text_at(record, "/network/peer/address");
    if (address.empty())
        return "those that share an entry";
    return with_port(address, number_at(record, "/network/peer/port"));
}

/// HOSTNAME: 1 to 255 characters of PRINTUSASCII; else its NILVALUE.
std::string host_name_of(const Json& record)
{
    const std::string name = text_at(record, "/host/name");
    const bool good = !name.empty() && name.size() <= 255 &&
                      std::all_of(name.begin(), name.end(), [](char c) { return c > ' ' && c <= '~'; });
    return good ? name : "-";
}

/// TIME-SECFRAC has six digits at most.
std::string microseconds_alone(const std::string& rfc3339)
{
    constexpr std::size_t digits = 6;
    const std::size_t point = rfc3339.find('.');
    if (point == std::string::npos)
        return rfc3339.empty() ? "-" : rfc3339;
    const std::size_t end = rfc3339.find_first_not_of("0123456789", point + 1);
    const std::string fraction = rfc3339.substr(point, std::min(digits + 1, end - point));
    return rfc3339.substr(0, point) + fraction + (end != std::string::npos ? rfc3339.substr(end) : "");
}

/// A value that has more than one line is preceded by its length instead of =.
void add_field(std::string& entry, std::string_view name, std::string_view value)
{
    entry += name;
    if (value.find('\n') == std::string_view::npos) {
        entry += '=';
    } else {
        entry += '\n';
        for (unsigned shift = 0; shift < 64; shift += 8)
            entry += static_cast<char>(static_cast<std::uint64_t>(value.size()) >> shift & 0xffU);
    }
    entry += value;
    entry += '\n';
}

std::string as_text(const Json& value)
{
    return value.is_string() ? value.get<std::string>() : to_line(value);
}

/// A list becomes a field that is there more than once.
void add_values(std::string& entry, const std::string& name, const Json& value)
{
    if (value.is_array()) {
        for (const Json& one : value)
            add_field(entry, name, as_text(one));
        return;
    }
    if (!value.is_object()) {
        add_field(entry, name, as_text(value));
        return;
    }
    for (const auto& [key, inner] : value.items()) {
        std::string longer = name.empty() ? "" : name + "_";
        std::transform(key.begin(), key.end(), std::back_inserter(longer),
                       [](char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c; });
        add_values(entry, longer, inner);
    }
}

} // namespace

std::string sentence_of(const Json& record)
{
    const std::string kind = kind_of(record);
    if (kind == "verdict")
        return fmt::format("{}: {}", text_at(record, "/finrace/cause"), text_at(record, "/finrace/message"));
    if (kind == "connection")
        return fmt::format("connection with {}: {} exchanges", peer_of(record),
                           number_at(record, "/finrace/connection/exchanges"));
    if (kind == "upstream")
        return fmt::format("upstream {}: {} connections opened, {} exchanges", peer_of(record),
                           number_at(record, "/finrace/upstream/connections/opened"),
                           number_at(record, "/finrace/upstream/exchanges"));
    return fmt::format("{}: {} connections followed, {} events lost, {} records dropped", kind,
                       number_at(record, "/finrace/health/connections/begun"),
                       number_at(record, "/finrace/lost_events"), number_at(record, "/finrace/output/dropped"));
}

std::string syslog_message(const Json& record, const Json& shown, pid_t pid)
{
    // ASCII alone: a message in UTF-8 has to begin with a byte order mark (section 6.4), which readers of JSON refuse.
    constexpr bool ascii = true;
    return fmt::format("<{}>1 {} {} finrace {} {} - {}", facility_daemon * 8 + severity_of(record),
                       microseconds_alone(text_at(record, "/timestamp")), host_name_of(record), pid, kind_of(record),
                       shown.dump(-1, ' ', ascii, Json::error_handler_t::replace));
}

std::string journal_entry(const Json& record)
{
    std::string entry;
    add_field(entry, "MESSAGE", sentence_of(record));
    add_field(entry, "PRIORITY", std::to_string(severity_of(record)));
    add_field(entry, "SYSLOG_IDENTIFIER", "finrace");
    add_values(entry, "", record);
    return entry;
}

} // namespace finrace
