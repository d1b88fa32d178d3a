// SPDX-License-Identifier: GPL-2.0-only OR MIT
#pragma once

#include <filesystem>
#include <fstream>
#include <ios>
#include <string>

#include <stdlib.h>

#include <catch2/catch.hpp>

namespace finrace::test {

/// For a test's files, which go with it.
struct Folder {
    std::string path = std::filesystem::temp_directory_path() / "finrace-test-XXXXXX";

    Folder() { REQUIRE(::mkdtemp(path.data()) != nullptr); }
    ~Folder() { std::filesystem::remove_all(path); }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;

    [[nodiscard]] std::string at(const std::string& name) const { return path + "/" + name; }
    /// A file's path, which has these bytes now.
    [[nodiscard]] std::string holding(const std::string& name, const std::string& bytes) const
    {
        std::ofstream(at(name), std::ios::binary | std::ios::trunc) << bytes;
        return at(name);
    }
};

} // namespace finrace::test
