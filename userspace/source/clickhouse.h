// SPDX-License-Identifier: GPL-2.0-only OR MIT
// A ClickHouse server, asked over its HTTP interface (https://clickhouse.com/docs/en/interfaces/http). The only user of
// cpp-httplib.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace finrace {

/// It can't be asked, or does not answer as it should; the text says what to do.
struct StoreError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class ClickHouse {
public:
    /// http[s]://[USER[:PASSWORD]@]HOST[:PORT][/PATH]. Without a password $CLICKHOUSE_PASSWORD is the user's. Throws
    /// StoreError.
    explicit ClickHouse(const std::string& url);

    /// Calls `take` for each row, which is one line of JSON (FORMAT JSONEachRow). Throws StoreError.
    void query(const std::string& sql, const std::function<void(std::string_view row)>& take) const;

    /// For people: without its user and password.
    [[nodiscard]] const std::string& name() const { return name_; }

private:
    bool tls_ = false;
    std::string host_; ///< an IPv6 address without its brackets
    int port_ = 0;
    std::string authority_; ///< RFC 3986 3.2, with the port: HTTP's Host
    std::string path_;
    std::string user_;
    std::string password_;
    std::string name_;
};

} // namespace finrace
