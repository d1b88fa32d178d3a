// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "source/clickhouse.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <memory>
#include <utility>

#include <fmt/format.h>
#include <httplib.h>

namespace finrace {

namespace {

constexpr std::string_view accepted = "accepted: http[s]://[USER[:PASSWORD]@]HOST[:PORT][/PATH]";
constexpr int patience_s = 10;         ///< to connect
constexpr int answer_patience_s = 600; ///< a query over all that there is
constexpr int unknown_database = 81;   ///< ErrorCodes.cpp
constexpr int unknown_table = 60;
constexpr int no_such_column = 16;
constexpr int unknown_identifier = 47;
/// 64-bit numbers as numbers; joins of sharded tables shard by shard: what belongs together is on one of them.
constexpr std::string_view settings =
    "?default_format=JSONEachRow&output_format_json_quote_64bit_integers=0&distributed_product_mode=local";

/// %41 is A. Throws StoreError.
std::string decoded(std::string_view text)
{
    std::string plain;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] != '%') {
            plain += text[i];
            continue;
        }
        unsigned byte = 0;
        const auto hex = text.substr(i + 1, 2);
        const auto [end, error] = std::from_chars(hex.data(), hex.data() + hex.size(), byte, 16);
        if (error != std::errc{} || hex.size() != 2 || end != hex.data() + 2)
            throw StoreError(fmt::format("a % in user or password begins no character; write it as %25; {}", accepted));
        plain += static_cast<char>(byte);
        i += 2;
    }
    return plain;
}

/// "Code: 60, e.displayText() = DB::Exception: ..." of any version: the number.
int error_code(std::string_view text)
{
    constexpr std::string_view before = "Code: ";
    const std::size_t at = text.find(before);
    int code = 0;
    if (at != std::string_view::npos)
        std::from_chars(text.data() + at + before.size(), text.data() + text.size(), code);
    return code;
}

std::string first_line(std::string_view text)
{
    constexpr std::size_t longest = 300;
    return std::string(text.substr(0, std::min(text.find('\n'), longest)));
}

} // namespace

ClickHouse::ClickHouse(const std::string& url)
{
    const std::string_view all(url);
    const std::size_t scheme = all.starts_with("http://") ? 7 : all.starts_with("https://") ? 8 : 0;
    if (scheme == 0)
        throw StoreError(fmt::format("that is no URL; {}", accepted));
    const std::string_view rest = all.substr(scheme);
    const std::size_t slash = std::min(rest.find('/'), rest.size());
    std::string_view authority = rest.substr(0, slash);
    path_ = rest.substr(slash);
    while (path_.ends_with('/'))
        path_.pop_back();
    if (const std::size_t at = authority.rfind('@'); at != std::string_view::npos) {
        const std::string_view who = authority.substr(0, at);
        const std::size_t colon = who.find(':');
        user_ = decoded(who.substr(0, colon));
        if (colon != std::string_view::npos)
            password_ = decoded(who.substr(colon + 1));
        authority.remove_prefix(at + 1);
    }
    if (path_.find('@') != std::string::npos) // quoted, it would tell a password
        throw StoreError(fmt::format("a / in user or password ends them; write it as %2F; {}", accepted));
    if (authority.empty() || path_.find('?') != std::string::npos)
        throw StoreError(fmt::format("that URL names no host, or has a query; {}", accepted));
    if (const char* password = std::getenv("CLICKHOUSE_PASSWORD"); password != nullptr && password_.empty())
        password_ = password;
    if (user_.empty() && !password_.empty())
        user_ = "default";
    const std::size_t port = authority.rfind(':');
    const bool has_port = port != std::string_view::npos && authority.find(']', port) == std::string_view::npos;
    unsigned number = 0;
    if (has_port) {
        const std::string_view digits = authority.substr(port + 1);
        const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
        if (error != std::errc{} || end != digits.data() + digits.size() || number == 0 || number > 65535)
            throw StoreError(fmt::format("what follows the host's : is no port; {}", accepted));
    }
    tls_ = all.starts_with("https");
    port_ = has_port ? static_cast<int>(number) : tls_ ? 8443 : 8123;
    const std::string_view host = authority.substr(0, has_port ? port : authority.size());
    const bool bracketed = host.starts_with('[') && host.ends_with(']');
    host_ = bracketed ? host.substr(1, host.size() - 2) : host;
    if (host_.empty())
        throw StoreError(fmt::format("that URL names no host; {}", accepted));
    authority_ = fmt::format("{}:{}", host, port_);
    name_ = fmt::format("{}{}{}", all.substr(0, scheme), authority_, path_);
}

void ClickHouse::query(const std::string& sql, const std::function<void(std::string_view row)>& take) const
{
    // Not by its URL: cpp-httplib 0.11 takes no letter in an IPv6 address there.
    const std::unique_ptr<httplib::ClientImpl> client =
        tls_ ? std::make_unique<httplib::SSLClient>(host_, port_) : std::make_unique<httplib::ClientImpl>(host_, port_);
    client->set_connection_timeout(patience_s);
    client->set_read_timeout(answer_patience_s);
    if (!user_.empty())
        client->set_basic_auth(user_, password_);
    const httplib::Result result =
        client->Post(path_ + "/" + std::string(settings), {{"Host", authority_}}, sql, "text/plain");
    if (!result)
        throw StoreError(fmt::format("{}: no answer ({}); --clickhouse takes its HTTP port (8123, by TLS 8443)", name_,
                                     httplib::to_string(result.error())));
    const std::string_view body = result->body;
    if (result->status != 200) {
        const int code = error_code(body);
        const char* hint = "";
        if (code == unknown_database || code == unknown_table)
            hint = "; finrace's tables are not there: make them by /usr/share/finrace/clickhouse/schema.sql";
        else if (code == no_such_column || code == unknown_identifier)
            hint = "; the tables are another version's: bring them to /usr/share/finrace/clickhouse/schema.sql "
                   "(operations.md, \"Upgrade\")";
        throw StoreError(fmt::format("{}: {}{}", name_,
                                     body.empty() ? fmt::format("status {}", result->status) : first_line(body), hint));
    }
    for (std::size_t from = 0; from < body.size();) {
        const std::size_t end = std::min(body.find('\n', from), body.size());
        if (body[from] != '{') // it failed in the midst of its answer
            throw StoreError(fmt::format("{}: {}", name_, first_line(body.substr(from))));
        if (end > from)
            take(body.substr(from, end - from));
        from = end + 1;
    }
}

} // namespace finrace
