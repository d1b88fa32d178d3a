// SPDX-License-Identifier: GPL-2.0-only OR MIT
// What people call their upstreams, and how much of anybody's address a record may tell.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "cli/command_line.h"
#include "cli/parse.h"
#include "core/upstream.h"
#include "sink/disguise.h"

namespace finrace {

class UpstreamNames {
public:
    /// ADDR[/LEN][:PORT]=NAME or :PORT=NAME. Throws UsageError.
    void add(const std::string& text);
    /// By the first pattern that matches; empty if there is none.
    [[nodiscard]] std::string_view of(const UpstreamKey& key) const;

private:
    AddressTable<std::string> names_;
};

/// How a run tells of addresses.
struct AddressOptions {
    UpstreamNames names;
    std::optional<Disguise::Scope> masked;
    std::optional<Disguise::Scope> hashed;
    std::string key_path;

    [[nodiscard]] bool disguises() const { return masked || hashed; }
    [[nodiscard]] bool hides_all() const { return masked == Disguise::Scope::all || hashed == Disguise::Scope::all; }
    /// As they say; with a key of its own where none is given. Throws UsageError: they contradict each other, there is
    /// no such key file, or it holds too little.
    [[nodiscard]] Disguise disguise() const;
};

/// --upstream-name, --mask-addresses, --hash-addresses and --hash-key. `options` must outlive the command.
void add_address_options(CLI::App& command, AddressOptions& options);

} // namespace finrace
