// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Control groups' paths, as systemd, the runtimes and the kubelet make them, and pods' names from the host's files.
#include <filesystem>
#include <string>

#include <catch2/catch.hpp>

#include "folder.h"
#include "source/placement.h"
#include "source/recording.h"

using namespace finrace;
using namespace finrace::test;

namespace {

const std::string id = "3f5c0e9a7b1d2c4e6f8091a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6";
const std::string uid = "0c9a2d6e-41b7-4f6b-9d0e-6a2c3b1f5e77";
const std::string escaped_uid = "0c9a2d6e_41b7_4f6b_9d0e_6a2c3b1f5e77";
const std::string static_uid = "7f1c0d3e5a6b4c2d8e9f0a1b2c3d4e5f";

} // namespace

TEST_CASE("the control group of /proc/PID/cgroup")
{
    CHECK(cgroup_of("0::/system.slice/nginx.service\n") == "/system.slice/nginx.service");
    CHECK(cgroup_of("12:pids:/a\n1:name=systemd:/b\n0::/c\n") == "/c");
    CHECK(cgroup_of("12:pids:/a\n1:name=systemd:/b\n0::/\n") == "/b");
    CHECK(cgroup_of("9:name=systemd:/\n0::/\n").empty());
    CHECK(cgroup_of("0::/a:name=systemd:/b") == "/a:name=systemd:/b");
    CHECK(cgroup_of("").empty());
}

TEST_CASE("a container is known by the digits that its runtime names it by")
{
    for (const std::string& path : {
             "/system.slice/docker-" + id + ".scope",
             "/docker/" + id,
             "/machine.slice/libpod-" + id + ".scope",
             "/machine.slice/libpod-" + id + ".scope/container",
             "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + escaped_uid +
                 ".slice/cri-containerd-" + id + ".scope",
             "/kubepods/besteffort/pod" + uid + "/" + id,
             "/kubepods.slice/kubepods-pod" + escaped_uid + ".slice/crio-" + id + ".scope",
             "/system.slice/containerd.service/kubepods-burstable-pod" + escaped_uid + ".slice:cri-containerd:" + id,
         })
        CHECK(placement_of(path).container_id == id);
    for (const std::string& path :
         {"/machine.slice/libpod-conmon-" + id + ".scope", "/docker/" + id + "0", "/docker/" + id.substr(1),
          "/docker/x" + id, std::string("/system.slice/nginx.service"), std::string("/"), std::string()})
        CHECK(placement_of(path).container_id.empty());
}

TEST_CASE("a pod is known by its uid, however it is written")
{
    CHECK(placement_of("/kubepods/besteffort/pod" + uid + "/" + id).pod_uid == uid);
    CHECK(placement_of("/kubepods.slice/kubepods-burstable-pod" + escaped_uid + ".slice/x.scope").pod_uid == uid);
    CHECK(placement_of("/kubepods/burstable/pod" + static_uid + "/" + id).pod_uid == static_uid);
    for (const char* path : {"/kubepods/besteffort", "/pod", "/podman.service"})
        CHECK(placement_of(path).pod_uid.empty());
    for (const std::string& path :
         {"/pod" + uid + "0", "/pod" + uid.substr(0, 30), "/xpod" + uid, "/pod" + static_uid + "a"})
        CHECK(placement_of(path).pod_uid.empty());
}

TEST_CASE("a unit is the nearest that is no container's own scope")
{
    CHECK(placement_of("/system.slice/nginx.service").unit == "nginx.service");
    CHECK(placement_of("/user.slice/user-0.slice/user@0.service/app.slice/proxy.service").unit == "proxy.service");
    CHECK(placement_of("/user.slice/user-0.slice/session-3.scope").unit == "session-3.scope");
    CHECK(placement_of("/system.slice/docker-" + id + ".scope").unit.empty());
    CHECK(placement_of("/system.slice").unit.empty());
}

TEST_CASE("below a user's own service manager nothing is believed but that it is that user's")
{
    const std::string own = "/user.slice/user-1000.slice/user@1000.service";
    for (const std::string& below : {std::string("/app.slice/nginx.service"), "/kubepods-pod" + escaped_uid + ".slice",
                                     "/kubepods-pod" + escaped_uid + ".slice/cri-containerd-" + id + ".scope",
                                     "/user.slice/libpod-" + id + ".scope", std::string()}) {
        const Placement there = placement_of(own + below);
        CHECK(there.unit == "user@1000.service");
        CHECK(there.pod_uid.empty());
        CHECK(there.container_id.empty());
        CHECK(there.cgroup == own + below);
    }
}

TEST_CASE("a pod's name is looked for among the folders of its logs")
{
    const Folder folder;
    PodNames names(folder.path);
    Placement placement{.pod_uid = uid};
    names.add_to(placement);
    CHECK(placement.pod_name.empty());
    std::filesystem::create_directory(folder.at("shop_billing-5d9c_" + uid));
    std::filesystem::create_directory(folder.at("nonsense"));
    std::filesystem::create_directory(folder.at("half_nonsense"));
    names.add_to(placement);
    CHECK(placement.pod_namespace == "shop");
    CHECK(placement.pod_name == "billing-5d9c");
    Placement other{.pod_uid = static_uid};
    names.add_to(other);
    CHECK(other.pod_name.empty());
    PodNames nowhere(folder.at("none"));
    nowhere.add_to(other);
    CHECK(other.pod_name.empty());
}

TEST_CASE("a placement is the same behind a recording")
{
    const std::string path = "/kubepods/besteffort/pod" + uid + "/" + id;
    const RecordedPlacement recorded{.pid = 7, .cgroup = path, .pod_namespace = {}, .pod_name = "w\nb"};
    const std::string line = encode(recorded);
    const auto read = std::get<RecordedPlacement>(*decode(line));
    CHECK(read.pid == 7);
    const Placement placement = placement_of(read);
    CHECK(placement.cgroup == path);
    CHECK(placement.container_id == id);
    CHECK(placement.pod_uid == uid);
    CHECK(placement.pod_name == "w\nb");
    CHECK(placement.pod_namespace.empty());
    for (std::size_t size = 0; size < line.size(); ++size)
        CHECK_FALSE(decode(line.substr(0, size)).has_value());
    const RecordedPlacement long_one{
        .pid = 7, .cgroup = "/" + std::string(100'000, 'x'), .pod_namespace = {}, .pod_name = {}};
    CHECK(std::get<RecordedPlacement>(*decode(encode(long_one))).cgroup.size() == 4096);
}
